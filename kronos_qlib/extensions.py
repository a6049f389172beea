"""Classes of a user's own in the place of a name of this package: `{class: …, module_path: …, kwargs: …}`.

What a point of extension is given and must return is a Protocol beside the names that it stands for. A class is found
and called once, with made-up numbers, before any long work. docs/extending.md shows one of each.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kronos_qlib.files import digest_of_file


def load_extension(configuration: Mapping[str, Any], **arguments: Any) -> Any:
    """Make the object that a configuration names.

    Args:
        configuration: class; module_path, a module's dotted name or a file's path; kwargs of the class, {} by default;
            digest, where `identify` has put it in.
        arguments: of the class, beside its kwargs.

    Raises:
        ValueError: an unknown key, a module or class that there is not or that fails, an object that cannot be called,
            a file that has changed since it was identified.
    """
    kind = _kind(configuration)
    try:
        made = kind(**configuration.get("kwargs", {}), **arguments)
    except Exception as error:
        raise ValueError(f"{kind.__name__} cannot be made: {reason(error)}") from error
    if not callable(made):
        raise ValueError(f"{kind.__name__} has no __call__")
    return made


def call_extension(extension: Any, shape: tuple[int, ...], *arguments: Any) -> np.ndarray:
    """Call an extension and check that it returns an array of numbers of this shape: float64.

    Raises:
        ValueError: it fails, or returns something else.
    """
    name = type(extension).__name__
    try:
        returned = np.asarray(extension(*arguments), dtype=np.float64)
    except Exception as error:
        raise ValueError(f"{name} fails: {reason(error)}") from error
    if returned.shape != shape:
        raise ValueError(f"{name} returns the shape {list(returned.shape)}, and should return {list(shape)}")
    return returned


def describe_extension(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run records of an extension: its configuration, its file, and the digest of what stands there."""
    kind = _kind(configuration)
    file = _file(kind)
    return {"class": kind.__name__, "module": kind.__module__, "file": file and str(file), "digest": _digest(kind)}


def identify(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that other processes can load and that says which text it is of; plain data.

    Raises ValueError for a class that is given itself, which has no name elsewhere.
    """
    if not isinstance(configuration["class"], str):
        raise ValueError("should give its class by name, with a module_path: other processes make it too")
    kind = _kind(configuration)
    return at_home(configuration) | {"kwargs": dict(configuration.get("kwargs", {})), "digest": _digest(kind)}


def identity_of(configuration: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what an identified configuration is, wherever its file lies: class, kwargs and digest; None of None."""
    return None if configuration is None else {key: configuration.get(key) for key in ("class", "kwargs", "digest")}


def at_home(configuration: Any) -> Any:
    """Return a configuration whose file is named by its whole path, for a process elsewhere; others as they are."""
    place = configuration.get("module_path") if isinstance(configuration, Mapping) else None
    if not isinstance(place, str) or not place.endswith(".py"):
        return configuration
    return dict(configuration) | {"module_path": str(Path(place).expanduser().resolve())}


def _kind(configuration: Mapping[str, Any]) -> type:
    """Return the class that a configuration names. Raises ValueError."""
    unknown = sorted(set(configuration) - {"class", "module_path", "kwargs", "digest"})
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known keys: class, module_path, kwargs")
    name, place = configuration["class"], configuration.get("module_path")
    if isinstance(name, type):
        return name
    if not isinstance(place, str) or not place:
        raise ValueError("should have a module_path: a module's dotted name, or a file's path")
    kind = getattr(_module(place), name, None)
    if not isinstance(kind, type):
        raise ValueError(f"module_path {place!r} has no class {name!r}")
    if "digest" in configuration and configuration["digest"] != _digest(kind):
        raise ValueError(f"{name}: {place} has changed since this run began; begin another")
    return kind


def _file(kind: type) -> Path | None:
    try:
        file = inspect.getsourcefile(kind)
    except TypeError:  # of a class made in a notebook
        return None
    return Path(file) if file and Path(file).is_file() else None


def _digest(kind: type) -> str | None:
    file = _file(kind)
    return digest_of_file(file) if file else None


def _module(place: str) -> Any:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).expanduser().resolve()
        name = f"kronos_qlib_extension_{digest_of_file(path)}"  # another text in the same place is another module
        if name not in sys.modules:
            specification = importlib.util.spec_from_file_location(name, path)
            assert specification is not None and specification.loader is not None
            module = importlib.util.module_from_spec(specification)
            sys.modules[name] = module  # so that its classes can be pickled within the process
            try:
                specification.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]
    except Exception as error:
        raise ValueError(f"module_path {place!r} cannot be imported: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Say in one line what a class of a user's own has raised."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
