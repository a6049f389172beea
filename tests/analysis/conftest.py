"""Each market is read once: read_market starts a process that imports Qlib."""

import functools

import pytest

from kronos_qlib.analysis import comparison


@pytest.fixture(autouse=True, scope="session")
def markets_read_once():
    read = functools.cache(lambda store, names, *span: comparison_read(store, list(names), *span))
    comparison_read = comparison.read_market
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "read_market", lambda store, names, *span: read(store, tuple(names), *span).copy())
        yield
