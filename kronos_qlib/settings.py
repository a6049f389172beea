"""Checks configuration once, at the edge; inside, values are trusted. An error is one line that names the key."""

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """Base of the checked keyword arguments of a class that a workflow file configures.

    The docstring under a field is its description in docs/settings.md; pydantic, whose reading of docstrings would take
    every process 0.3 s, does not know it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Restore a pickle; a key that there was not yet when it was made gets its default."""
        super().__setstate__(state)
        for name, field in type(self).model_fields.items():
            if not field.is_required():
                self.__dict__.setdefault(name, field.get_default())


AnySettings = TypeVar("AnySettings", bound=Settings)


MISSING: Any = ...
"""Default of an argument that must be given: `read_settings` then says which key is missing, in one line."""


def read_settings(kind: type[AnySettings], owner: str, values: Mapping[str, Any]) -> AnySettings:
    """Check `values` and return them as a `kind`; a ValueError, one line, names `owner`, key and what it should be."""
    try:
        return kind(**{key: value for key, value in values.items() if value is not MISSING})
    except ValidationError as error:
        lines = [_describe(problem, kind) for problem in error.errors()]
        raise ValueError(f"{owner}: " + "; ".join(dict.fromkeys(lines))) from None


def check_configuration(value: Any) -> Any:
    """Check what Qlib makes an object of: the object itself, a mapping with its class, or the path of a class.

    Raises ValueError.
    """
    if isinstance(value, Mapping):
        if not isinstance(value.get("class"), (str, type)):
            raise ValueError("should be a configuration with the keys class, module_path and kwargs")
        if not isinstance(value.get("kwargs", {}), Mapping):
            raise ValueError("should have a mapping of arguments as its kwargs")
    elif value is None or isinstance(value, (bool, int, float, list, tuple, bytes)) or "." not in str(value):
        raise ValueError("should be a configuration with the keys class, module_path and kwargs")
    return value


def _describe(problem: Mapping[str, Any], kind: type[Settings]) -> str:
    """Describe one of pydantic's problems with settings of a `kind`."""
    key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("function-", "list[", "dict[")))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}; known keys: {', '.join(_settings_at(kind, problem['loc'][:-1]).model_fields)}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, not {problem['input']!r}" if key else message


def _settings_at(kind: type[Settings], keys: tuple[Any, ...]) -> type[Settings]:
    """Return the kind of settings that `keys` lead to within a `kind`."""
    for key in keys:
        annotation = kind.model_fields[key].annotation
        types = (annotation, *get_args(annotation))  # itself, or one of a union
        kind = next(each for each in types if isinstance(each, type) and issubclass(each, Settings))
    return kind
