"""Each market is read once, and here: read_market starts a process that imports Qlib, as test_wheel.py has it do."""

import functools

import pytest

from kronos_qlib.analysis import comparison, market


@pytest.fixture(autouse=True, scope="session")
def markets_read_once():
    read = functools.cache(lambda store, names, *span: market._read(str(store.resolve()), list(names), *span))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "read_market", lambda store, names, *span: read(store, tuple(names), *span).copy())
        yield
