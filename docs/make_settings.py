"""Write docs/settings.md from the pydantic models: python docs/make_settings.py. A test holds the page to date."""

import ast
import inspect
import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pandas as pd
from pydantic.fields import FieldInfo

from kronos_qlib.data.dataset import DatasetSettings
from kronos_qlib.data.extra import ExtraData
from kronos_qlib.data.handler import HandlerSettings
from kronos_qlib.settings import Settings
from kronos_qlib.train.adapters import LoraSettings
from kronos_qlib.train.settings import AutoOrCount, PredictorSettings, RankerSettings, TokenizerSettings
from kronos_qlib.workflow.kronos_factors import FactorSettings, PcaSettings
from kronos_qlib.workflow.ranker import RankerModelSettings
from kronos_qlib.workflow.records import RecordSettings
from kronos_qlib.workflow.rules import RuleSettings
from kronos_qlib.workflow.settings import (
    CalibrationSettings,
    ForecastSettings,
    ModelSettings,
    WorkflowFinetuneSettings,
)

PAGE = Path(__file__).parent / "settings.md"
SECTIONS: dict[str, Sequence[type[Settings]]] = {
    "KronosModel": [ModelSettings],
    "KronosModel: `forecast`": [ForecastSettings],
    "KronosModel: `calibration`": [CalibrationSettings],
    "KronosModel: `finetune`": [WorkflowFinetuneSettings],
    "`finetune`: `tokenizer` and `predictor`": [TokenizerSettings, PredictorSettings],
    "`tokenizer` and `predictor`: `lora`": [LoraSettings],
    "`finetune`: an entry of `extra_data`": [ExtraData],
    "KronosRanker": [RankerModelSettings],
    "KronosRanker: `ranker`": [RankerSettings],
    "KronosFactors and Alpha158Kronos: `kronos`": [FactorSettings],
    "KronosFactors: `pca`": [PcaSettings],
    "KLineDataset": [DatasetSettings],
    "KLineHandler": [HandlerSettings],
    "FactorScore": [RuleSettings],
    "ForecastRecord": [RecordSettings],
}
HEAD = """\
# Settings

<!-- Written by docs/make_settings.py from the pydantic models. -->

The keys of a workflow file, for each class or mapping. An unknown key, a wrong type and an impossible value are errors,
in one line that names the key, before any long work. What the scores are: [Scores](scores.md).
"""
NAMES = {
    **{str: "text", int: "whole number", float: "number", bool: "true or false", pd.Timestamp: "date"},
    **{list: "list", dict: "mapping", NoneType: "null", Any: ""},
}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page() -> str:
    """Return the page's text."""
    return "\n".join([HEAD, *(line for title, kinds in SECTIONS.items() for line in section(title, kinds))])


def section(title: str, kinds: Sequence[type[Settings]]) -> Iterator[str]:
    """Yield the lines of a section: one table for settings of several kinds, their defaults side by side.

    A field that a subclass defines anew keeps its parent's description.
    """
    yield f"## {title}\n"
    yield " ".join(" ".join((kind.__doc__ or "").split()) for kind in kinds) + "\n"
    yield "| key | values | default | meaning |\n|---|---|---|---|"
    for key in dict.fromkeys(key for kind in kinds for key in kind.model_fields):
        holders = [kind for kind in kinds if key in kind.model_fields]
        fields = [kind.model_fields[key] for kind in holders]
        defaults = "; ".join(dict.fromkeys(default_text(field) for field in fields))
        meaning = next(words for kind in holders[0].__mro__ if (words := descriptions(kind).get(key)))
        only = f" (only `{['tokenizer', 'predictor'][kinds.index(holders[0])]}`)" if len(holders) < len(kinds) else ""
        yield f"| `{key}`{only} | {values(fields[0])} | {defaults} | {' '.join(meaning.split())} |"
    yield ""


@cache
def descriptions(kind: type[Settings]) -> dict[str, str]:
    """Return the docstrings under a class's own fields, by field."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    found = {}
    for field, below in pairwise(definition.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(words))):
                found[key] = words
    return found


def default_text(field: FieldInfo) -> str:
    """Return a default as YAML shows it."""
    if field.is_required():
        return "required"
    if isinstance(field.default, Settings):
        return "see below"
    return f"`{json.dumps(field.default)}`" if not isinstance(field.default, str) else f"`{field.default}`"


def values(field: FieldInfo) -> str:
    """Return which values a key takes: types, alternatives and bounds."""
    if field.metadata == [*get_args(AutoOrCount)[1:]]:
        return "`auto` or whole number ≥ 1"
    bounds = [
        f"{BOUNDS[name]} {getattr(item, name)}" for item in field.metadata for name in BOUNDS if hasattr(item, name)
    ]
    return type_text(field.annotation, ", ".join(bounds).replace(str(2**63), "2^63"))


def type_text(annotation: Any, bounds: str) -> str:
    """Return a type in words, with the bounds of its numbers."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin in (Union, UnionType):
        return " or ".join(filter(None, (type_text(argument, bounds) for argument in arguments)))
    if origin is Annotated:
        return type_text(arguments[0], bounds)
    if origin in (list, dict):
        return NAMES[origin]
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return NAMES[dict]
    return f"{NAMES[annotation]} {bounds}".strip() if annotation in (int, float) else NAMES[annotation]


if __name__ == "__main__":
    PAGE.write_text(page())
