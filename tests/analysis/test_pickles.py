"""A crafted artifact runs nothing, and one of Qlib's is read."""

import collections
import pathlib
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kronos_qlib.analysis.pickles import read_plain, read_table

INDEX = pd.MultiIndex.from_product(
    [pd.bdate_range("2024-01-02", periods=3), ["A", "B"]], names=["datetime", "instrument"]
)
TABLES = [
    pd.Series(np.arange(6.0), INDEX, name="score"),
    pd.DataFrame({"score": np.arange(6, dtype=np.float32)}, INDEX),
    pd.DataFrame({"return": [0.1]}, index=pd.DatetimeIndex(["2024-01-02"], freq="B", name="datetime")),
    pd.DataFrame({"name": ["a", "b"], "kind": pd.Categorical(["x", "y"])}),
    pd.Series([pd.Timestamp("2024-01-02"), pd.NaT]),
]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("table", TABLES, ids=lambda table: type(table).__name__)
def test_tables_are_read(tmp_path, table, protocol):
    (tmp_path / "table.pkl").write_bytes(pickle.dumps(table, protocol))
    found = read_table(tmp_path / "table.pkl")
    compare = pd.testing.assert_series_equal if isinstance(table, pd.Series) else pd.testing.assert_frame_equal
    compare(found, table)


def crafted(module: str, name: str, argument: str, protocol: int) -> bytes:
    """A pickle that calls a function with a text, as an attacker writes it."""
    text = f"V{argument}\n".encode()
    if protocol < 4:
        return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + text + b"tR."
    names = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    return b"\x80\x04" + names + b"\x93(" + text + b"tR."


CALLS = [
    ("os", "system"),
    ("posix", "system"),
    ("pathlib", "os.system"),
    ("collections", "_sys.modules"),
    ("datetime", "sys.exit"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("pandas", "eval"),
    ("pandas", "read_pickle"),
    ("numpy", "load"),
    ("pandas._libs.tslibs.offsets", "os.system"),
    ("pandas._libs.tslibs.offsets", "warnings"),
    ("qlib.utils.index_data", "np.load"),
]


@pytest.mark.parametrize("reader", [read_table, read_plain])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(("module", "name"), CALLS, ids=lambda part: part)
def test_a_crafted_pickle_runs_nothing(tmp_path, module, name, protocol, reader):
    seen = tmp_path / "seen"
    (tmp_path / "evil.pkl").write_bytes(crafted(module, name, f"touch {seen}", protocol))
    if reader is read_table:
        with pytest.raises(ValueError, match=f"it holds {module}.{name}"):
            reader(tmp_path / "evil.pkl")
    else:
        assert reader(tmp_path / "evil.pkl") == {}
    assert not seen.exists()


def test_qrun_s_config_is_read_without_the_model_in_it(tmp_path):
    config = {
        "qlib_init": {"provider_uri": Path("market")},
        "task": {"model": pathlib, "n": collections.OrderedDict(a=1)},
    }
    config["task"]["model"] = pd.DataFrame({"x": [1]})
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    found = read_plain(tmp_path / "config")
    assert found["qlib_init"] == {"provider_uri": Path("market")} and found["task"]["n"] == {"a": 1}
    assert not isinstance(found["task"]["model"], pd.DataFrame)


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: bytes(reversed(b)), lambda b: b"OK"]
)
@pytest.mark.parametrize("reader", [read_table, read_plain])
def test_a_damaged_pickle_is_one_line(tmp_path, damage, reader):
    (tmp_path / "table.pkl").write_bytes(damage(pickle.dumps(TABLES[0])))
    with pytest.raises(ValueError, match="is damaged or no pickle") as refused:
        reader(tmp_path / "table.pkl")
    assert "\n" not in str(refused.value)
