"""Qlib pointed at a store of any frequency."""

from pathlib import Path

import qlib


def use_store(folder: Path, freq: str) -> None:
    uri = str(folder) if freq == "day" else {freq: str(folder)}
    qlib.init(provider_uri=uri, region="cn", kernels=1, logging_level=40, clear_mem_cache=True)
