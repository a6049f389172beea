"""Counts how malformed inputs are answered: each should get one clear line, and damage should change no result.

    python benchmarks/malformed.py                 # all families, some minutes on two cores
    python benchmarks/malformed.py settings store  # some of them

Inputs are generated, not listed: every key of every setting gets values of wrong types and out of its bounds (what is
wrong follows from the field's type), every argument of the Python face gets wrong values, every file of a store, a
checkpoint, a cache and a training is cut, emptied, turned by a bit and filled with random bytes, and every node of a
workflow is replaced by other values.

An answer is clear if it is one error of one line, raised by this package, that names the offender, or a warning that
names and counts what is left out. Damaged caches and
training checkpoints are named in the log, and the result is the same, bit by bit, as without the damage. Ends with
status 1 if an answer is not clear.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pandas as pd
import torch
import yaml
from pydantic.fields import FieldInfo
from safetensors.torch import load_file, save_file
from table import print_row

import kronos_qlib
from kronos_qlib import KLineDataset, KLineHandler, Kronos, KronosModel, KronosPredictor, KronosTokenizer
from kronos_qlib.cli import main as command_line
from kronos_qlib.data.dataset import DatasetSettings
from kronos_qlib.data.demo_market import write_demo_market
from kronos_qlib.data.extra import ExtraData
from kronos_qlib.data.handler import HandlerSettings
from kronos_qlib.forecast.engine.generate import sample_paths
from kronos_qlib.settings import Settings
from kronos_qlib.train.adapters import LoraSettings
from kronos_qlib.train.settings import FinetuneSettings, PredictorSettings, TokenizerSettings
from kronos_qlib.workflow.records import ForecastRecord, RecordSettings
from kronos_qlib.workflow.rules import FactorScore, RuleSettings
from kronos_qlib.workflow.settings import ForecastSettings, ModelSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # before the benchmarks' own walks
from networks import MODEL, TOKENIZER, make_networks

PACKAGE = str(Path(kronos_qlib.__file__).parent)
NUMBERS = {"-1": -1, "0": 0, "1.5": 1.5, "10**30": 10**30, "nan": np.nan, "inf": np.inf}
POOL: dict[str, Any] = {
    **NUMBERS,
    "null": None,
    "true": True,
    "'x'": "x",
    "''": "",
    "[]": [],
    "[1]": [1],
    "{}": {},
    "{'a': 1}": {"a": 1},
    "bytes": b"x",
    "an object": object(),
}
LOOKBACK, HORIZON = 10, 3


@dataclass(frozen=True)
class Malformed:
    """An input: what is wrong with it, what is called with it, and the words of which the answer should have one.

    same: for damage that is mended: the result without the damage, which the call should give again; the log has to
        name the offender then.
    """

    name: str
    call: Callable[[], Any]
    offenders: tuple[str, ...]
    same: Any = field(default=None, compare=False)


def fault(case: Malformed) -> str | None:
    """Say what is wrong with the answer to an input; None if it is clear."""
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger("qlib").addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stderr(io.StringIO()) as printed:
            warnings.simplefilter("always")
            with contextlib.redirect_stdout(printed):
                result = case.call()
    except SystemExit as exit_:
        return _fault_of_command(case, exit_.code, printed.getvalue())
    except Exception as error:
        return _fault_of_error(case, error)
    finally:
        logging.getLogger("qlib").removeHandler(handler)
    said = logged.getvalue() + " ".join(str(warning.message) for warning in warned)
    if case.same is None:  # a part may be left out, if a warning counts and names it
        counted = any(character.isdigit() for character in said) and any(word in said for word in case.offenders)
        return None if counted else f"accepted: {result!r:.80}"
    if result != case.same:
        return "a wrong result"
    return None if any(word in said for word in case.offenders) else f"not named: {said:.120}"


def _fault_of_error(case: Malformed, error: Exception) -> str | None:
    message, frame = str(error), traceback.extract_tb(error.__traceback__)[-1]
    kind = f"{type(error).__name__}: {message:.160}"
    if not frame.filename.startswith(PACKAGE):
        return f"raised at {frame.filename}:{frame.lineno}, {kind}"
    if not isinstance(error, (ValueError, OSError)):
        return f"an error of code, {kind}"
    if "\n" in message.strip():
        return f"more than one line, {kind}"
    return None if any(word in message for word in case.offenders) else f"names none of {case.offenders}, {kind}"


def _fault_of_command(case: Malformed, status: Any, printed: str) -> str | None:
    lines = [line for line in printed.splitlines() if ": error: " in line or line.startswith("✗")]
    if "Traceback" in printed:
        return f"a traceback: {printed[-160:]!r}"
    if status == 0:
        return f"status 0: {printed[-160:]!r}"
    named = [line for line in lines if any(word in line for word in case.offenders)]
    return None if named else f"no line of {len(lines)} names {case.offenders}: {printed[-200:]!r}"


# ---- settings ----

# What fields without a telling type take; the validators of the package are not asked.
_KINDS: dict[str, tuple[type, ...]] = {
    "tokenizer": (str, dict),
    "model": (str, dict),
    "extra_data": (list,),
    "batch_size": (int,),
    "micro_batch_size": (int,),
    "processes": (int,),
    "instruments": (str, list, dict),
    "handler": (dict,),
    "label": (str, list),
    "start_time": (str, type(None)),
    "end_time": (str, type(None)),
}
_EMPTY = ("", [], {})  # of a kind that is taken, but nothing


def wrong_values(name: str, info: FieldInfo) -> Iterator[tuple[str, Any]]:
    """Yield values that a setting of this name and field cannot have, with their names."""
    kinds, choices = _kinds(info.annotation)
    if Any in kinds:
        kinds = _KINDS.get(name, ()) if name in _KINDS else tuple(kind for kind in kinds if kind is not Any)
    for called, value in POOL.items():
        if _is_kind(value, kinds):
            known_text = choices or name in ("score", "device", "dtype", "freq", "exchange", "start_time", "end_time")
            wrong = isinstance(value, str) and (known_text and value not in choices)
            wrong = wrong or _beyond_bounds(value, info) or (value in _EMPTY and name in _KINDS)
            wrong = wrong or (isinstance(value, (list, dict)) and value and name not in ("fetch_kwargs",))
            if not wrong:
                continue
        elif value in choices:
            continue
        yield called, value


def _kinds(annotation: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the types that an annotation takes, and the values of its Literals."""
    if get_origin(annotation) is Literal:
        return (), get_args(annotation)
    if get_origin(annotation) in (list, dict):
        return (get_origin(annotation),), ()
    inner = get_args(annotation)
    if not inner:
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            return (dict,), ()
        return (annotation,), ()
    if hasattr(annotation, "__metadata__"):
        inner = inner[:1]
    found = [_kinds(part) for part in inner]
    return sum((kinds for kinds, _ in found), ()), sum((choices for _, choices in found), ())


def _is_kind(value: Any, kinds: tuple[Any, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))


def _beyond_bounds(value: Any, info: FieldInfo) -> bool:
    if isinstance(value, float) and not np.isfinite(value):
        return True
    for bound in info.metadata:
        for sign, holds in (("ge", "__ge__"), ("gt", "__gt__"), ("le", "__le__"), ("lt", "__lt__")):
            limit = getattr(bound, sign, None)
            if limit is not None and isinstance(value, (int, float)) and getattr(value, holds)(limit) is not True:
                if not getattr(float(value), holds)(float(limit)):
                    return True
        least = getattr(bound, "min_length", None)
        if least is not None and isinstance(value, (str, list, dict)) and len(value) < least:
            return True
    return False


def settings_inputs(folder: Path) -> Iterator[Malformed]:
    """Every key of every setting with values of other types and out of bounds, a key that there is not, a key less."""
    good: dict[str, Any] = {"tokenizer": TOKENIZER, "model": MODEL, "device": "cpu"}
    stage = {"epochs": 1}
    finetune = {"output_dir": str(folder / "out"), "tokenizer": stage, "predictor": stage}
    data = {"handler": KLineHandler("demo"), "segments": {"test": ["2018-06-18", "2018-07-31"]}}

    def model(**changes: Any) -> KronosModel:
        return KronosModel(**good | changes)

    def in_stage(stage_name: str) -> Callable[..., Any]:
        return lambda **keys: model(finetune=finetune | {stage_name: stage | keys})

    makers: dict[str, tuple[type[Settings], Callable[..., Any]]] = {
        "KronosModel": (ModelSettings, model),
        "forecast": (ForecastSettings, lambda **keys: model(forecast=keys)),
        "finetune": (FinetuneSettings, lambda **keys: model(finetune=finetune | keys)),
        "finetune.tokenizer": (TokenizerSettings, in_stage("tokenizer")),
        "finetune.predictor": (PredictorSettings, in_stage("predictor")),
        "lora": (LoraSettings, lambda **keys: in_stage("predictor")(lora=keys)),
        "extra_data": (
            ExtraData,
            lambda **keys: model(finetune=finetune | {"extra_data": [{"instruments": "demo"} | keys]}),
        ),
        "KLineHandler": (HandlerSettings, lambda **keys: KLineHandler(**{"instruments": "demo"} | keys)),
        "KLineDataset": (DatasetSettings, lambda **keys: KLineDataset(**data | keys)),
        "FactorScore": (RuleSettings, lambda **keys: FactorScore(**{"feature": "A"} | keys)),
        "ForecastRecord": (RecordSettings, lambda **keys: ForecastRecord(_model(), _dataset(), **keys)),
    }
    for owner, (kind, make) in makers.items():
        for name, info in kind.model_fields.items():
            for called, value in wrong_values(name, info):
                if called == "null" and name in ("forecast", "fetch_kwargs", "columns", "conditions"):
                    continue  # as if it were not given
                yield Malformed(f"{owner} {name}: {called}", lambda m=make, n=name, v=value: m(**{n: v}), (name,))
        yield Malformed(f"{owner}: an unknown key", lambda m=make: m(nothing=1), ("nothing",))
    for name in ("tokenizer", "model"):
        less = {key: value for key, value in good.items() if key != name}
        yield Malformed(f"KronosModel without {name}", lambda less=less: KronosModel(**less), (name,))
    for name in data:
        less = {key: value for key, value in data.items() if key != name}
        yield Malformed(f"KLineDataset without {name}", lambda less=less: KLineDataset(**less), (name,))
    yield Malformed("KLineHandler without instruments", KLineHandler, ("instruments",))
    for called, segment in {
        "one date": ["2018-06-18"],
        "three": ["2018-06-18"] * 3,
        "reversed": ["2018-07-31", "2018-06-18"],
        "a zone": ["2018-06-18T00:00:00+08:00", "2018-07-31"],
        "no date": ["someday", None],
        "beyond the data": ["2031-01-01", None],
        **POOL,
    }.items():
        yield Malformed(
            f"segment: {called}", lambda s=segment: KLineDataset(**data | {"segments": {"test": s}}), ("test",)
        )
    for called, value in {**POOL, "an unknown name": "other", "a zone": ("2018-06-18T00:00+08:00", None)}.items():
        yield Malformed(
            f"score_windows of {called}", lambda v=value: _dataset().score_windows(v), ("segment", "window")
        )
    for label in ("$nothing", "Ref($close)", "1 +", "import os", "Ref($close, -2", "nothing($close)", "$close $open"):
        yield Malformed(f"label {label}", lambda text=label: KLineHandler("demo", label=text), ("label",))


def _dataset() -> KLineDataset:
    return KLineDataset(
        KLineHandler("demo"), {"test": ["2018-06-18", "2018-07-31"]}, lookback=LOOKBACK, horizon=HORIZON
    )


def _model(**changes: Any) -> KronosModel:
    return KronosModel(**{"tokenizer": TOKENIZER, "model": MODEL, "device": "cpu", "dtype": "float32"} | changes)


# ---- checkpoints ----


def damaged(content: bytes, count: int = 8, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield damaged versions of a file: empty, cut, random, text, a byte less or more, a bit turned at places."""
    rng = np.random.default_rng(seed)
    yield "empty", b""
    yield "cut in half", content[: len(content) // 2]
    yield "a byte less", content[:-1]
    yield "random bytes", rng.bytes(max(len(content), 16))
    yield "text", b"nothing of that kind"
    for place in np.linspace(0, len(content) - 1, count).astype(int).tolist():
        turned = bytearray(content)
        turned[place] ^= 1 << int(rng.integers(8))
        yield f"a bit turned in byte {place:,}", bytes(turned)


def checkpoint_inputs(folder: Path) -> Iterator[Malformed]:
    """Every key of config.json with other values, tensors of other names, shapes, types and values, damaged files."""
    networks = dict(zip(("tokenizer", "model"), make_networks()))
    for called, network in networks.items():
        good = folder / called
        network.save_pretrained(good)
        load = type(network).from_pretrained
        config = json.loads((good / "config.json").read_text())
        tensors = load_file(good / "model.safetensors")

        def copy_with(name: str, content: bytes, good: Path = good, called: str = called) -> Path:
            place = Path(tempfile.mkdtemp(dir=folder, prefix=called))
            shutil.copytree(good, place, dirs_exist_ok=True)
            (place / name).write_bytes(content)
            return place

        def load_with(name: str, content: bytes, load: Any = load, copy_with: Any = copy_with) -> Any:
            place = copy_with(name, content)
            try:
                return load(place)
            finally:
                shutil.rmtree(place)

        for key in config:
            kinds = (int, float) if isinstance(config[key], float) else (type(config[key]),)
            values = {n: v for n, v in POOL.items() if not isinstance(v, bytes) and n != "an object"}
            values |= {"10**9": 10**9} if kinds == (int,) else {}
            for n, value in values.items():
                impossible = isinstance(value, (int, float)) and not 0 < value < 1
                if _is_kind(value, kinds) and not impossible:
                    continue
                if value == config[key] and isinstance(value, type(config[key])):
                    continue
                if isinstance(config[key], (bool, float)) and _is_kind(value, kinds) and value == 0:
                    continue
                if (
                    isinstance(config[key], float)
                    and not key.endswith("dropout_p")
                    and _is_kind(value, kinds)
                    and np.isfinite(float(value))
                ):
                    continue  # weights of the loss
                content = json.dumps(config | {key: value}).encode()
                yield Malformed(
                    f"{called} config {key}: {n}", lambda c=content, f=load_with: f("config.json", c), (key, "tensor")
                )
        for key in config:
            less = {k: v for k, v in config.items() if k != key}
            yield Malformed(
                f"{called} config without {key}",
                lambda c=less, f=load_with: f("config.json", json.dumps(c).encode()),
                (key,),
            )
        for text in ("[]", "5", "null", "{", "{" * 100_000, "[" * 100_000, '{"a": 1}'):
            yield Malformed(
                f"{called} config {text[:9]}",
                lambda c=text, f=load_with: f("config.json", c.encode()),
                ("config.json",),
            )
        for how, content in damaged((good / "model.safetensors").read_bytes()):
            if not how.startswith("a bit"):  # the hub's format has no checksum
                yield Malformed(
                    f"{called} weights: {how}",
                    lambda c=content, f=load_with: f("model.safetensors", c),
                    ("model.safetensors",),
                )
        floats = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
        for name in [floats[0], floats[len(floats) // 2], floats[-1]]:
            for how, tensor in {
                "missing": None,
                "of bool": tensors[name] > 0,
                "of int8": tensors[name].to(torch.int8),
                "of int64": tensors[name].to(torch.int64),
                "with NaN": tensors[name] * torch.nan,
                "infinite": tensors[name] * torch.inf,
                "longer": torch.cat([tensors[name], tensors[name]]),
                "flat": tensors[name].reshape(-1, 1, 1),
            }.items():
                changed = {n: t for n, t in tensors.items() if n != name} | ({} if tensor is None else {name: tensor})
                path = folder / "changed.safetensors"

                def load_changed(changed: Any = changed, path: Path = path, load_with: Any = load_with) -> Any:
                    save_file(changed, path)
                    return load_with("model.safetensors", path.read_bytes())

                yield Malformed(f"{called} tensor {name} {how}", load_changed, (name,))
    for called, other in (("tokenizer", Kronos), ("model", KronosTokenizer)):
        yield Malformed(
            f"{called} loaded as the other", lambda c=called, o=other: o.from_pretrained(folder / c), ("config.json",)
        )
    for called, source in {"no folder": "no/such/folder", "a NUL": "a\0b", "a file": __file__, "nothing": ""}.items():
        for kind in (Kronos, KronosTokenizer):
            yield Malformed(
                f"{kind.__name__} from {called}",
                lambda k=kind, s=source: k.from_pretrained(s, local_files_only=True),
                (source or "''", "folder", repr(source)),
            )


# ---- store ----


def store_inputs(folder: Path) -> Iterator[Malformed]:
    """Every file of a store damaged, and bars that no market prints."""
    good = Path(os.environ["MALFORMED_MARKET"])

    def read(place: Path) -> Any:
        _use(place)
        dataset = KLineDataset(
            KLineHandler("demo"), {"test": ["2018-06-18", "2018-07-31"]}, lookback=LOOKBACK, horizon=HORIZON
        )
        return dataset.score_windows("test")

    def with_file(name: str, content: bytes) -> Any:
        place = Path(tempfile.mkdtemp(dir=folder, prefix="store"))
        try:
            shutil.copytree(good, place, dirs_exist_ok=True)
            (place / name).write_bytes(content)
            return read(place)
        finally:
            shutil.rmtree(place)
            _use(good)

    def of(name: str, offenders: tuple[str, ...], **contents: bytes) -> Iterator[Malformed]:
        for how, content in contents.items():
            yield Malformed(f"{name}: {how.replace('_', ' ')}", lambda n=name, c=content: with_file(n, c), offenders)

    calendar = (good / "calendars/day.txt").read_text().split()
    yield from of(
        "calendars/day.txt",
        ("day.txt", "segment"),
        empty=b"",
        no_date="\n".join([*calendar[:5], "someday", *calendar[6:]]).encode(),
        impossible_date="\n".join([*calendar[:5], "2018-02-30", *calendar[6:]]).encode(),
        twice="\n".join([*calendar[:5], calendar[4], *calendar[6:]]).encode(),
        reversed="\n".join(reversed(calendar)).encode(),
        random=np.random.default_rng(0).bytes(200),
        utf16="\n".join(calendar).encode("utf-16"),
        numbers=b"1\n2\n3\n",
        short="\n".join(calendar[:50]).encode(),
    )
    universe = (good / "instruments/demo.txt").read_text().splitlines()
    name = universe[0].split("\t")[0]
    yield from of(
        "instruments/demo.txt",
        ("demo.txt", "'demo'"),
        empty=b"",
        two_columns="\n".join([f"{name}\t2018-01-02", *universe[1:]]).encode(),
        commas="\n".join(line.replace("\t", ",") for line in universe).encode(),
        spaces="\n".join(line.replace("\t", " ") for line in universe).encode(),
        ends_before_it_starts="\n".join([f"{name}\t2018-07-01\t2018-02-01", *universe[1:]]).encode(),
        no_date="\n".join([f"{name}\tsomeday\t2018-02-01", *universe[1:]]).encode(),
        no_name="\n".join(["\t2018-01-02\t2018-02-01", *universe[1:]]).encode(),
        no_utf8=b"\xff" + "\n".join(universe).encode(),
        random=np.random.default_rng(1).bytes(200),
    )
    for column in ("open", "high", "low", "close", "volume"):
        path = f"features/{name.lower()}/{column}.day.bin"
        values = np.fromfile(good / path, "<f4")
        heads = {"nan": np.nan, "half": 0.5, "negative": -1, "huge": 1e9, "infinite": np.inf}
        yield from of(
            path,
            (Path(path).name,),
            empty=b"",
            cut=values.tobytes()[:-2],
            longer=np.append(values, values).astype("<f4").tobytes(),
            **{
                f"head_{how}": np.append(np.float32(head), values[1:]).astype("<f4").tobytes()
                for how, head in heads.items()
            },
        )
        for how, wrong in {"infinite": np.inf, "negative": -5.0, "0": 0.0}.items():
            if column == "volume" and how == "0":
                continue
            changed = values.copy()
            changed[110] = wrong
            yield from of(path, (name,), **{how: changed.astype("<f4").tobytes()})
        if column in ("open", "close"):
            for how, factor in {"above_high": 1.2, "below_low": 0.8}.items():
                changed = values.copy()
                changed[110] *= factor
                yield from of(path, (name,), **{how: changed.astype("<f4").tobytes()})


def _use(folder: Path) -> None:
    import qlib

    qlib.init(provider_uri=str(folder), region="cn", kernels=1, logging_level=logging.ERROR, clear_mem_cache=True)


# ---- predictor ----


def predictor_inputs(folder: Path) -> Iterator[Malformed]:
    """Every argument of KronosPredictor and its methods with wrong values, frames and times of every wrong kind."""
    tokenizer, model = make_networks()
    predictor = KronosPredictor(model, tokenizer, device="cpu")
    times = pd.bdate_range("2024-01-02", periods=LOOKBACK + HORIZON)
    frame = _frame(times[:LOOKBACK])
    good: dict[str, Any] = {
        "df": frame,
        "x_timestamp": pd.Series(times[:LOOKBACK]),
        "y_timestamp": pd.Series(times[LOOKBACK:]),
        "pred_len": HORIZON,
    }

    def set_value(column: str, value: Any) -> pd.DataFrame:
        changed = frame.astype(object)
        changed.loc[changed.index[3], column] = value
        return changed

    frames = {
        **{f"a {type(value).__name__}": value for value in (frame.to_numpy(), [1, 2], frame["close"], None, "x", 5)},
        "no bars": frame.iloc[:0],
        "two levels": pd.concat({"A": frame}, axis=1),
        "close twice": pd.concat([frame, frame[["close"]]], axis=1),
        "close and Close": frame.assign(**{"CLOSE ": frame["close"], "Close": frame["close"]}).drop(columns="close"),
    }
    for column in ("open", "high", "low", "close"):
        frames[f"no {column}"] = frame.drop(columns=column)
    for column in ("open", "close", "volume"):
        for called, value in {
            "nan": np.nan,
            "inf": np.inf,
            "text": "x",
            "complex": 1j,
            "None": None,
            "bytes": b"x",
        }.items():
            frames[f"{called} in {column}"] = set_value(column, value)
        frames[f"bools in {column}"] = frame.assign(**{column: True})
        frames[f"times in {column}"] = frame.assign(**{column: times[:LOOKBACK]})
    for called, value in frames.items():
        offenders = ("df", "column")
        for method in ("predict", "predict_paths"):
            yield Malformed(
                f"{method} df: {called}", lambda m=method, v=value: _predict(predictor, m, good | {"df": v}), offenders
            )
    for name, length in (("x_timestamp", LOOKBACK), ("y_timestamp", HORIZON)):
        right = times[:LOOKBACK] if name == "x_timestamp" else times[LOOKBACK:]
        for called, value in {
            "a RangeIndex": pd.RangeIndex(length),
            "floats": pd.Series(np.arange(length) + 0.5),
            "bools": pd.Series([True] * length),
            "times of day": pd.Series([f"{9 + i}:30" for i in range(length)]),
            "text": pd.Series(["x"] * length),
            "a zone": right.tz_localize("UTC"),
            "reversed": right[::-1],
            "twice": right.repeat(2)[:length],
            "one less": right[:-1],
            "NaT": pd.Series([pd.NaT, *right[1:]]),
            "numbers": pd.Series(range(5, 5 + length)),
            "dates that are none": pd.Series([20240230 + i for i in range(length)]),
            "timedeltas": pd.Series(right - right[0]),
            "null": None,
            "a number": 5,
            "complex": pd.Series(np.arange(length) * 1j),
        }.items():
            for method in ("predict", "predict_paths"):
                yield Malformed(
                    f"{method} {name}: {called}",
                    lambda m=method, n=name, v=value: _predict(predictor, m, good | {n: v}),
                    (name,),
                )
    yield Malformed(
        "y_timestamp before the last bar",
        lambda: _predict(predictor, "predict", good | {"y_timestamp": times[:HORIZON]}),
        ("y_timestamp",),
    )
    own = {
        "T": "temperature",
        "pred_len": "pred_len",
        "top_k": "top_k",
        "top_p": "top_p",
        "sample_count": "sample_count",
    }
    for method in ("predict", "predict_paths"):
        for argument, setting in (own | {"seed": "seed"}).items():
            for called, value in _wrong_options(setting):
                if setting == "seed" and value is None and method == "predict":
                    continue
                yield Malformed(
                    f"{method} {argument}: {called}",
                    lambda m=method, a=argument, v=value: _predict(predictor, m, good | {a: v}),
                    (setting,),
                )
    lists = {"df_list": [frame], "x_timestamp_list": [good["x_timestamp"]], "y_timestamp_list": [good["y_timestamp"]]}
    for name in lists:
        for called, value in {
            "null": None,
            "5": 5,
            "[]": [],
            "two": lists[name] * 2,
            "[null]": [None],
            "'x'": "x",
        }.items():
            changed = lists | {name: value}
            offenders = tuple(n for n in lists) if called == "two" else (name, name.removesuffix("_list"))
            yield Malformed(
                f"predict_batch {name}: {called}",
                lambda c=changed: predictor.predict_batch(*c.values(), pred_len=HORIZON, verbose=False),
                offenders,
            )
    made = {"model": model, "tokenizer": tokenizer, "device": "cpu"}
    for name in ("model", "tokenizer"):
        for called, value in (POOL | {"'nano'": "nano"}).items():
            yield Malformed(
                f"KronosPredictor {name}: {called}", lambda n=name, v=value: KronosPredictor(**made | {n: v}), (name,)
            )
    yield Malformed("networks exchanged", lambda: KronosPredictor(tokenizer, model, device="cpu"), ("place",))
    for name, allowed in {
        "max_context": (),
        "clip": ("1.5", "10**30"),
        "s2_rotation": (),
        "normalisation": (),
        "dtype": ("null",),
        "device": ("null",),
    }.items():
        for called, value in POOL.items():
            if called not in allowed:
                yield Malformed(
                    f"KronosPredictor {name}: {called}",
                    lambda n=name, v=value: KronosPredictor(**made | {n: v}),
                    (name,),
                )


def _predict(predictor: KronosPredictor, method: str, arguments: Mapping[str, Any]) -> Any:
    extra = {"verbose": False} if method == "predict" else {}
    return getattr(predictor, method)(**arguments, **extra)


def _frame(times: pd.DatetimeIndex) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    close = 20 * np.exp(np.cumsum(rng.normal(0, 0.02, len(times))))
    bars = {
        "open": close,
        "high": close * 1.01,
        "low": close * 0.99,
        "close": close,
        "volume": 1e4,
        "amount": 1e4 * close,
    }
    return pd.DataFrame(bars, times)


def _wrong_options(name: str) -> Iterator[tuple[str, Any]]:
    """Yield values that an option of a forecast cannot have."""
    allowed = {
        "temperature": ("1.5", "10**30"),
        "top_p": (),
        "top_k": ("0", "10**30"),
        "seed": ("0", "-1", "10**30"),
        "sample_count": (),
        "pred_len": (),
        "max_context": (),
    }
    for called, value in POOL.items():
        if called not in allowed[name]:
            yield called, value


def engine_inputs(folder: Path) -> Iterator[Malformed]:
    """Every argument of `sample_paths` with wrong values, tensors of every wrong kind."""
    tokenizer, model = make_networks()
    rng = np.random.default_rng(0)
    good: dict[str, Any] = {
        "tokenizer": tokenizer,
        "model": model,
        "x": rng.normal(size=(2, LOOKBACK, 6)).astype("f4"),
        "x_stamp": np.ones((2, LOOKBACK, 5), int),
        "y_stamp": np.ones((2, HORIZON, 5), int),
        "max_context": 32,
    }

    def call(**changes: Any) -> Any:
        return sample_paths(**good | changes)

    def inputs(name: str, values: Mapping[str, Any], *others: str) -> Iterator[Malformed]:
        for called, value in values.items():
            yield Malformed(f"{name}: {called}", lambda n=name, v=value: call(**{n: v}), (name, *others))

    for name in ("x", "x_stamp", "y_stamp"):
        array = good[name]
        yield from inputs(
            name,
            POOL
            | {
                "text": "x",
                "ragged": [[1.0], [1.0, 2.0]],
                "a scalar": 5.0,
                "on meta": torch.zeros(array.shape, device="meta"),
                "objects": array.astype(object),
                "complex": array * 1j,
                "bools": array > 0,
                "a column less": array[..., :-1],
                "two levels": array[0],
                "a window less": array[:1],
                "no bars": array[:, :0],
                "times": np.array([["2024-01-02"]], "datetime64[ns]"),
                "nan": array * np.nan,
                "infinite": array * np.inf,
            },
        )
    for name in ("x_stamp", "y_stamp"):
        for column in range(5):
            for value in (-1, 10**6):
                changed = good[name].copy()
                changed[1, 2, column] = value
                yield Malformed(f"{name} {column}: {value}", lambda n=name, v=changed: call(**{n: v}), (name,))
    for name in ("temperature", "top_p", "top_k", "seed", "sample_count", "max_context"):
        yield from inputs(name, dict(_wrong_options(name)))
    for name in ("s2_rotation", "sampling"):
        yield from inputs(name, POOL)
    for name in ("tokenizer", "model"):
        yield from inputs(name, POOL)
    yield Malformed("networks exchanged", lambda: call(tokenizer=model, model=tokenizer), ("place",))
    yield from inputs("keys", {"text": ["a", "b"], "one": [1], "floats": [0.5, 1.5], "three": [1, 2, 3], "5": 5})


# ---- cache and trainings ----


def cache_inputs(folder: Path) -> Iterator[Malformed]:
    """Every chunk of a forecast cache damaged: it is named and computed again, to the same scores."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def scores(cache: Path) -> bytes:
        return _model(forecast={"sample_count": 2, "cache_dir": str(cache)}).predict(_dataset()).to_numpy().tobytes()

    good = folder / "cache"
    whole = scores(good)
    (chunk,) = (path.relative_to(good) for path in good.glob("*/chunk-*.parquet"))
    table = pq.read_table(good / chunk)

    def with_chunk(content: bytes) -> bytes:
        place = Path(tempfile.mkdtemp(dir=folder, prefix="cache"))
        shutil.copytree(good, place, dirs_exist_ok=True)
        (place / chunk).write_bytes(content)
        try:
            return scores(place)
        finally:
            shutil.rmtree(place)

    def written(changed: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        pq.write_table(changed, sink)
        return sink.getvalue().to_pybytes()

    for how, content in damaged((good / chunk).read_bytes(), 40):
        yield Malformed(f"chunk: {how}", lambda c=content: with_chunk(c), ("chunk-",), whole)
    for number, name in enumerate(table.column_names):
        without = table.drop_columns([name])
        yield Malformed(f"chunk without {name}", lambda t=without: with_chunk(written(t)), ("chunk-",), whole)
        for kind in (pa.string(), pa.float32(), pa.int64(), pa.binary()):
            try:
                column = table.column(name).cast(kind)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                column = pa.chunked_array([pa.nulls(len(table), kind)])
            if column.type != table.column(name).type:
                changed = table.set_column(number, name, column)
                yield Malformed(
                    f"chunk with {name} as {kind}", lambda t=changed: with_chunk(written(t)), ("chunk-",), whole
                )
    for called, value in {"a file": str(folder / "file"), "a NUL": "a\0b", "empty": ""}.items():
        (folder / "file").touch()
        yield Malformed(f"cache_dir: {called}", lambda v=value: scores(v), ("cache_dir", "file"))


def training_inputs(folder: Path) -> Iterator[Malformed]:
    """Every file of an interrupted training damaged: it is named, and the training ends with the same weights."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "train"))
    from jobs import job, results

    from kronos_qlib.train.step import TrainingStep

    short = {"epochs": 1, "windows_per_epoch": 32}

    def train(place: Path) -> dict[str, bytes]:
        job(place, short, None).run()
        return results(place)

    whole = train(folder / "whole")
    take, steps = TrainingStep.take, []

    def interrupted(*given: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return take(*given)

    stopped = folder / "stopped"
    TrainingStep.take = interrupted
    with contextlib.suppress(KeyboardInterrupt):
        job(stopped, short, None, checkpoint_every=1).run()
    TrainingStep.take = take

    def with_file(name: Path, content: bytes | None) -> dict[str, bytes]:
        place = Path(tempfile.mkdtemp(dir=folder, prefix="train"))
        shutil.copytree(stopped, place, dirs_exist_ok=True)
        (place / name).unlink() if content is None else (place / name).write_bytes(content)
        try:
            return train(place)
        finally:
            shutil.rmtree(place)

    newest = max((stopped / "tokenizer/checkpoints").glob("step-????????")).relative_to(stopped)
    for path in sorted((stopped / newest).iterdir()):
        name = path.relative_to(stopped)
        for how, content in damaged(path.read_bytes(), 6):
            yield Malformed(f"{path.name}: {how}", lambda n=name, c=content: with_file(n, c), (newest.name,), whole)
        yield Malformed(f"{path.name}: missing", lambda n=name: with_file(n, None), (newest.name,), whole)
    progress = json.loads((stopped / newest / "progress.json").read_text())
    for key in progress:
        for called, value in {n: v for n, v in POOL.items() if n in ("null", "'x'", "[1]", "{}", "-1")}.items():
            content = json.dumps(progress | {key: value}).encode()
            yield Malformed(
                f"progress.json {key}: {called}",
                lambda c=content: with_file(newest / "progress.json", c),
                (newest.name,),
                whole,
            )
    for name in ("identity.json", "history.csv"):
        path = Path("tokenizer") / name
        for how, content in damaged((stopped / path).read_bytes(), 0):
            mended = name == "history.csv" or how == "a byte less"  # its rows are in the checkpoints; a line's end
            yield Malformed(
                f"{name}: {how}",
                lambda n=path, c=content: with_file(n, c),
                ("",) if mended else (name,),
                whole if mended else "an error is expected",
            )


# ---- command line ----


def workflow_inputs(folder: Path) -> Iterator[Malformed]:
    """Every node of a workflow replaced by other values: `check` and `finetune --dry-run` answer in lines."""
    workflow = _workflow(folder)

    def check(changed: Any) -> None:
        path = folder / "workflow.yaml"
        path.write_text(changed if isinstance(changed, str) else yaml.safe_dump(changed))
        try:
            raise SystemExit(command_line(["check", str(path)]))
        finally:
            _use(Path(os.environ["MALFORMED_MARKET"]))

    needed = ("qlib_init", "provider_uri", "exp_manager", "task", "model", "dataset", "handler", "segments")
    for keys in _nodes(workflow):
        for called, value in {"null": None, "5": 5, "[]": [], "{}": {}, "'x'": "x"}.items():
            if keys[-1] not in needed or (keys[-1] in ("model", "dataset") and keys[-2:-1] != ("task",)):
                continue
            if keys[-1] == "provider_uri" and called == "'x'":
                continue
            changed = _replaced(workflow, keys, value)
            yield Malformed(f"{'.'.join(keys)}: {called}", lambda c=changed: check(c), (keys[-1], *keys))
    for keys in _nodes(workflow):
        changed = _replaced(workflow, keys, {"nothing": [None]})
        called = f"{'.'.join(map(str, keys))}: {{nothing: [null]}}"
        yield Malformed(called, lambda c=changed: check(c), (*map(str, keys), "nothing", "file"))
    text = yaml.safe_dump(workflow)
    for called, template in {
        "a template that does not close": text + "\n{{ 'x ",
        "a template that divides by zero": text + "\n{{ 1 / 0 }}",
        "a tab": text + "\n\tx: 1",
        "no mapping": "- a\n- b\n",
        "a number": "5\n",
        "nothing": "",
        "a base that is a number": text + "\nBASE_CONFIG_PATH: 5\n",
        "a base that is a list": text + "\nBASE_CONFIG_PATH: [a]\n",
        "a base that is not there": text + "\nBASE_CONFIG_PATH: other.yaml\n",
        "deep": "[" * 5000,
    }.items():
        yield Malformed(f"workflow: {called}", lambda t=template: check(t), ("workflow.yaml",))
    for name, path in {"no file": folder / "no.yaml", "a folder": folder}.items():
        yield Malformed(
            f"check {name}",
            lambda p=path: (_ for _ in ()).throw(SystemExit(command_line(["check", str(p)]))),
            (str(path),),
        )


def _nodes(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*before, key)
        yield from _nodes(inner, (*before, key))


def _replaced(tree: Any, keys: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(tree)
    inner = changed
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return changed


def _workflow(folder: Path) -> dict[str, Any]:
    handler = {"class": "KLineHandler", "module_path": "kronos_qlib", "kwargs": {"instruments": "demo"}}
    segments = {"test": ["2018-06-18", "2018-07-31"]}
    dataset = {"handler": handler, "segments": segments, "lookback": LOOKBACK, "horizon": HORIZON}
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    manager = {"class": "MLflowExpManager", "module_path": "qlib.workflow.expm"}
    return {
        "qlib_init": {
            "provider_uri": os.environ["MALFORMED_MARKET"],
            "region": "cn",
            "kernels": 1,
            "exp_manager": manager | {"kwargs": {"uri": uri, "default_exp_name": "Experiment"}},
        },
        "task": {
            "model": {
                "class": "KronosModel",
                "module_path": "kronos_qlib",
                "kwargs": {"tokenizer": TOKENIZER, "model": MODEL, "device": "cpu"},
            },
            "dataset": {"class": "KLineDataset", "module_path": "kronos_qlib", "kwargs": dataset},
            "record": [],
        },
    }


def _market() -> Path:
    """Write the demo market that all families read, once in a process, and point Qlib at it."""
    if "MALFORMED_MARKET" not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="malformed-"))
        os.environ["MALFORMED_MARKET"] = str(write_demo_market(folder / "market", instruments=6, days=160))
    _use(Path(os.environ["MALFORMED_MARKET"]))
    return Path(os.environ["MALFORMED_MARKET"])


FAMILIES: dict[str, Callable[[Path], Iterator[Malformed]]] = {
    "settings": settings_inputs,
    "checkpoint": checkpoint_inputs,
    "store": store_inputs,
    "predictor": predictor_inputs,
    "engine": engine_inputs,
    "cache": cache_inputs,
    "training": training_inputs,
    "workflow": workflow_inputs,
}


def faults(family: str, folder: Path, every: int = 1) -> tuple[int, dict[str, str]]:
    """Count the inputs of a family, every so many of them, and say of each whose answer is not clear what is wrong."""
    _market()
    count, found = 0, {}
    for number, case in enumerate(FAMILIES[family](folder)):
        if number % every == 0:
            count += 1
            wrong = fault(case)
            if wrong:
                found[case.name] = wrong
    return count, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="FAMILY", help=", ".join(FAMILIES))
    options = parser.parse_args()
    wrong = 0
    for number, family in enumerate(options.families):
        with tempfile.TemporaryDirectory() as folder:
            count, found = faults(family, Path(folder))
        print_row({"family": family, "inputs": count, "not clear": len(found)}, with_heading=number == 0)
        for name, text in found.items():
            print(f"    {name}: {text}")
        wrong += len(found)
    shutil.rmtree(Path(os.environ["MALFORMED_MARKET"]).parent)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
