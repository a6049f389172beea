"""Each market is read once: read_market starts a process that imports Qlib."""

import functools

import pytest

from kronos_qlib.analysis import comparison


@pytest.fixture(autouse=True, scope="session")
def markets_read_once():
    read_market = comparison.read_market
    read = functools.cache(lambda store, names, *span: read_market(store, list(names), *span))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "read_market", lambda store, names, *span: read(store, tuple(names), *span).copy())
        yield
