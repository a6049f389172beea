"""Reads the pickles of Qlib's recorders without running what a crafted one asks for.

A pickle names the functions and classes that build its objects, and a crafted one names `os.system`. So each name is
looked up here, as an exact pair of module and name: modules re-export others, and a dotted name reaches into them.
"""

import pickle
from pathlib import Path
from typing import Any

from pandas.tseries.offsets import BaseOffset

_PLAIN = {
    "_codecs": "encode",  # of bytes, in the oldest protocols
    "__builtin__": "bytearray complex frozenset set slice",  # of Python 2, whose names old protocols use
    "builtins": "bytearray complex frozenset set slice",
    "collections": "OrderedDict",
    "datetime": "date datetime time timedelta timezone",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
}
_TABLES = {
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "pandas": "CategoricalDtype DataFrame DatetimeIndex Index MultiIndex RangeIndex Series StringDtype",
    "pandas._libs.arrays": "__pyx_unpickle_NDArrayBacked",
    "pandas._libs.internals": "_unpickle_block",
    "pandas._libs.tslibs.nattype": "_nat_unpickle",
    "pandas._libs.tslibs.timedeltas": "_timedelta_unpickle",
    "pandas._libs.tslibs.timestamps": "_unpickle_timestamp",
    "pandas.arrays": "ArrowStringArray Categorical DatetimeArray StringArray",
    "pandas.core.arrays.categorical": "Categorical",
    "pandas.core.arrays.datetimes": "DatetimeArray",
    "pandas.core.arrays.string_": "StringArray StringDtype",
    "pandas.core.arrays.string_arrow": "ArrowStringArray ArrowStringArrayNumpySemantics",
    "pandas.core.dtypes.dtypes": "CategoricalDtype",
    "pandas.core.frame": "DataFrame",
    "pandas.core.indexes.base": "Index _new_Index",
    "pandas.core.indexes.datetimes": "DatetimeIndex _new_DatetimeIndex",
    "pandas.core.indexes.multi": "MultiIndex",
    "pandas.core.indexes.range": "RangeIndex",
    "pandas.core.internals.managers": "BlockManager SingleBlockManager",
    "pandas.core.series": "Series",
    "pyarrow.lib": "_restore_array py_buffer type_for_alias",
    # Qlib's Indicator of a backtest, whose objects hold dictionaries of arrays
    "qlib.backtest.high_performance_ds": "NumpyOrderIndicator",
    "qlib.backtest.report": "Indicator",
    "qlib.utils.index_data": "Index SingleData",
}
_OFFSETS = "pandas._libs.tslibs.offsets"  # frequencies of a DatetimeIndex
_NEEDLESS = {("qlib.log", "QlibLogger")}


class _Unread:
    """Stands for an object that is not wanted, whatever it is built with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __repr__(self) -> str:
        return "(not read)"  # without an address, so that the settings of two runs compare

    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...
    def add(self, value: Any) -> None: ...


class _PlainUnpickler(pickle.Unpickler):
    """Reads mappings, lists, text, numbers, dates and paths; anything else becomes `_Unread`."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if name in _PLAIN.get(module, "").split() else _Unread


class _TableUnpickler(pickle.Unpickler):
    """Reads pandas objects, arrays and Qlib's indicator; anything else is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NEEDLESS:
            return _Unread
        if module == _OFFSETS and name.isidentifier():
            found = super().find_class(module, name)
            if isinstance(found, type) and issubclass(found, BaseOffset):
                return found
        if name not in f"{_PLAIN.get(module, '')} {_TABLES.get(module, '')}".split():
            raise pickle.UnpicklingError(f"it holds {module}.{name}, neither a table nor an array nor a plain value")
        return super().find_class(module, name)


def read_plain(path: Path) -> dict[str, Any]:
    """Read the plain data of qrun's `config`, into which Qlib has filled the trained model and the dataset.

    Raises:
        ValueError: the file is no pickle, or is damaged; one line.
    """
    config = _read(_PlainUnpickler, path)
    return config if isinstance(config, dict) else {}


def read_table(path: Path) -> Any:
    """Read a table, a series or Qlib's indicator.

    Raises:
        ValueError: the file is no pickle, is damaged, or holds something else; one line.
    """
    return _read(_TableUnpickler, path)


def _read(kind: type[pickle.Unpickler], path: Path) -> Any:
    with path.open("rb") as file:
        try:
            return kind(file).load()
        except Exception as error:  # a damaged pickle may raise anything
            message = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"is damaged or no pickle of this kind: {message}") from error
