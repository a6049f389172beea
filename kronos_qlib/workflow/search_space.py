"""The search space of a tuning: settings of a workflow, the ranges they are tried in, and the workflow chosen."""

import copy
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import Field, JsonValue, model_validator
from ruamel.yaml import YAML, YAMLError

from kronos_qlib.files import whole_file
from kronos_qlib.settings import Settings, read_settings
from kronos_qlib.workflow.workflow_file import read_workflow, render_template

Floats: TypeAlias = Annotated[list[float], Field(min_length=2, max_length=2)]
Ints: TypeAlias = Annotated[list[int], Field(min_length=2, max_length=2)]
Choices: TypeAlias = Annotated[list[JsonValue], Field(min_length=2)]

MARK = "# Written by kronos-qlib tune"
_PARTS = ("task.model.kwargs.", "task.dataset.kwargs.")
# What decides on which bars and labels all trials are measured, or where they write.
_FIXED = ("segments", "end_time", "fit_start_time", "fit_end_time", "label", "instruments", "freq", "output_dir")


class Range(Settings):
    """The values of one key: `{float: [low, high]}`, `{int: [low, high]}` or `{choice: [...]}`.

    Both ends are included. With `log: true`, of numbers, small values are tried as finely as large ones, in proportion.
    """

    log: bool = False
    choice: Choices | None = None
    int: Ints | None = None
    float: Floats | None = None

    @model_validator(mode="after")
    def _is_one_range(self) -> "Range":
        given = [name for name in ("float", "int", "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("should be one of {float: [low, high]}, {int: [low, high]} and {choice: [...]}")
        if self.choice is not None:
            if self.log:
                raise ValueError("log is of float and int, not of choice")
            if len(set(map(_text, self.choice))) < len(self.choice):
                raise ValueError(f"choice has a value twice: {self.choice}")
            return self
        low, high = getattr(self, given[0])
        if low >= high:
            raise ValueError(f"{given[0]} should be [low, high], low below high, not {[low, high]}")
        if self.log and low <= 0:
            raise ValueError(f"log needs a low above 0, not {low}")
        return self

    @property
    def distribution(self) -> BaseDistribution:
        """Return the range as Optuna knows it; choices are JSON texts there, which tell 1 from true."""
        if self.choice is not None:
            return CategoricalDistribution([_text(value) for value in self.choice])
        if self.int is not None:
            return IntDistribution(self.int[0], self.int[1], log=self.log)
        assert self.float is not None
        return FloatDistribution(self.float[0], self.float[1], log=self.log)

    def holds(self, value: Any) -> bool:
        """Say whether a value is one of the range."""
        if self.choice is not None:
            return _text(value) in map(_text, self.choice)
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            return False
        low, high = self.int or self.float or (0, 0)
        return low <= value <= high and (self.int is None or value == round(value))

    def __str__(self) -> str:
        if self.choice is not None:
            return " | ".join(map(_text, self.choice))
        low, high = self.int or self.float or (0, 0)
        return f"{low:g} … {high:g}{', log' if self.log else ''}{', whole' if self.int else ''}"


class SearchSpace:
    """What a tuning tries: dotted keys of a workflow, each with its `Range`."""

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        self.ranges = dict(ranges)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the ranges as Optuna knows them."""
        return {key: each.distribution for key, each in self.ranges.items()}

    def values(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that Optuna's parameters stand for."""
        choice = {key for key, each in self.ranges.items() if each.choice is not None}
        return {key: json.loads(value) if key in choice else value for key, value in parameters.items()}

    def parameters(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return Optuna's parameters for settings: all of them, or none if one lies outside its range."""
        if not all(each.holds(values[key]) for key, each in self.ranges.items()):
            return {}
        kinds = {key: int if each.int else float for key, each in self.ranges.items() if each.choice is None}
        return {key: kinds.get(key, _text)(values[key]) for key in self.ranges}

    def present(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values that a workflow has for the keys."""
        return {key: _mapping_of(config, key)[key.split(".")[-1]] for key in self.ranges}

    def touches(self, part: str) -> bool:
        """Say whether a key lies in a part of the workflow."""
        return any(key.startswith(f"{part}.") for key in self.ranges)


def read_space(path: Path, config: Mapping[str, Any], workflow: Path) -> SearchSpace:
    """Read a file of dotted keys of a workflow and their ranges.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key that the workflow lacks or that decides what is measured, or no range; one line names the key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of a search space")
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: should map dotted keys of the workflow to ranges, such as {{int: [1, 9]}}")
    ranges = {}
    for key, value in content.items():
        _check_key(str(key), config, f"{path}: {key}", workflow)
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}: {key}: should be a mapping such as {{float: [0.01, 0.3], log: true}}")
        ranges[str(key)] = read_settings(Range, f"{path}: {key}", {str(name): each for name, each in value.items()})
    return SearchSpace(ranges)


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a workflow with other values of dotted keys; mappings that are missing are made."""
    changed = copy.deepcopy(dict(config))
    for key, value in values.items():
        _set(changed, key, value)
    return changed


def write_tuned(workflow: Path, out: Path, name: str, values: Mapping[str, Any], comment: list[str]) -> Path:
    """Write the workflow with other values of dotted keys as a file that `qrun` runs; its comments and templates stay.

    It is a copy, since a base of `qrun` has neither templates nor a base of its own.

    Args:
        name: of the experiment. comment: lines that stand first.
    """
    yaml = YAML(typ="rt")
    yaml.preserve_quotes, yaml.width = True, 10_000
    text = workflow.read_text(encoding="utf-8")
    try:
        content = yaml.load(text)
    except YAMLError:  # templates beyond quoted texts: as they are filled now
        content = yaml.load(render_template(str(workflow)))
    content["experiment_name"] = name
    base = content.get("BASE_CONFIG_PATH")
    if base is not None:
        found = Path(base) if Path(base).is_file() else workflow.absolute().parent / base  # as qrun looks for it
        content["BASE_CONFIG_PATH"] = _relative(found, out)
    folders = (content.get("sys") or {}).get("rel_path")
    if folders:
        folders = [folders] if isinstance(folders, str) else folders
        content["sys"]["rel_path"] = [_relative(workflow.absolute().parent / each, out) for each in folders]
    for key, value in values.items():
        _set(content, key, value)
    written = io.StringIO()
    yaml.dump(content, written)
    with whole_file(out) as draft:
        draft.write_text("".join(f"{line}\n" for line in comment) + written.getvalue(), encoding="utf-8")
    read_workflow(out)
    return out


def _check_key(key: str, config: Mapping[str, Any], owner: str, workflow: Path) -> None:
    if not key.startswith(_PARTS):
        raise ValueError(f"{owner}: only {' and '.join(f'{part}…' for part in _PARTS)} can be tried")
    fixed = next((part for part in key.split(".") if part in _FIXED), None)
    if fixed:
        raise ValueError(f"{owner}: {fixed} decides what the trials are measured on, or where; it cannot be tried")
    parent, last = _mapping_of(config, key), key.split(".")[-1]
    if last not in parent:
        known = f"; known there: {', '.join(map(str, parent))}" if parent else ""
        raise ValueError(f"{owner}: {workflow} has no such key{known}; a value is needed there, which is tried first")


def _mapping_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the mapping that holds a dotted key's last part, or the nearest one above it, which lacks the key."""
    *parts, last = key.split(".")
    for part in parts:
        inner = config.get(part)
        if not isinstance(inner, Mapping):
            return {} if last in config else config
        config = inner
    return config


def _set(config: Any, key: str, value: Any) -> None:
    *parts, last = key.split(".")
    for part in parts:
        if not isinstance(config.get(part), Mapping):
            config[part] = {}
        config = config[part]
    config[last] = value


def _relative(path: Path, out: Path) -> str:
    return Path(os.path.relpath(path.absolute(), out.absolute().parent)).as_posix()


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
