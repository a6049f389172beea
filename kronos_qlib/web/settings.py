"""What a server was started with: folders by name, limits, and who may ask."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from pydantic import Field

from kronos_qlib.ingest.store_files import is_store
from kronos_qlib.settings import Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORT = 7070
LEAST_TOKEN = 16
_FOREIGN = re.compile(r"[^A-Za-z0-9._-]+")


class Limits(Settings):
    """What a request may ask for at most."""

    request_bytes: int = Field(default=65_536, ge=1024)
    """Bytes of a request that is no upload."""
    upload_bytes: int = Field(default=64 * 2**20, ge=1024)
    """Bytes of an uploaded file."""
    unpacked_bytes: int = Field(default=512 * 2**20, ge=1024)
    """Bytes of an uploaded zip, gz or Parquet file when it is read."""
    rows: int = Field(default=1_000_000, ge=1)
    """Rows of an uploaded file."""
    columns: int = Field(default=200, ge=4)
    """Columns of an uploaded file."""
    files: int = Field(default=100, ge=1)
    """Uploads that are kept; the oldest go."""
    lookback: int = Field(default=2048, ge=2)
    """Bars seen."""
    horizon: int = Field(default=500, ge=1)
    """Bars forecast."""
    samples: int = Field(default=1000, ge=1)
    """Sample paths."""
    bars: int = Field(default=4_000_000, ge=1)
    """Samples × horizon × instruments."""
    waiting: int = Field(default=64, ge=1)
    """Jobs that wait; more are refused with status 429."""
    answers: int = Field(default=256, ge=1)
    """Answers that are kept."""
    requests: int = Field(default=512, ge=1)
    """Requests that are served at once."""
    seconds: float = Field(default=30.0, gt=0)
    """Seconds in which the next piece of a request's body has to come."""


@dataclass(frozen=True)
class ServerSettings:
    """What a server was started with.

    stores: folders of Qlib stores by name. models: names of the zoo, or folders, by name. uploads: the folder of the
    users' files; None: none are taken. ledger: its URL; forecasts of stores are kept in it. runs: the MLflow store's
    URI. token: what requests must bring; hosts: names under which browsers reach the server, beside those of this
    machine. port: of this server, 0: any. paths_shown: whether the snippet of a forecast names folders: to users of
    this machine only. exchange: whose sessions the instruments of stores follow, where their names do not tell.
    device: of the networks.
    """

    stores: dict[str, Path] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=lambda: {"nano": "nano"})
    uploads: Path | None = None
    ledger: str | None = None
    runs: str | None = None
    token: str | None = None
    hosts: tuple[str, ...] = ()
    port: int = 0
    paths_shown: bool = True
    exchange: str | None = None
    device: str | None = "cpu"
    limits: Limits = field(default_factory=Limits)


def name_folders(folders: Iterable[Path], others: Collection[str] = ()) -> dict[str, Path]:
    """Give each folder the name of its last part, a number after it where that is another's name; resolved."""
    named: dict[str, Path] = {}
    for folder in folders:
        path = folder.expanduser().resolve()
        stem = _FOREIGN.sub("-", path.name).strip("-.") or "folder"
        numbered = (stem, *(f"{stem}-{number}" for number in range(2, 1000)))
        name = next(name for name in numbered if name not in named and name not in others)
        if path not in named.values():
            named[name] = path
    return named


def name_stores(folders: Iterable[Path]) -> dict[str, Path]:
    """Name folders of Qlib stores. Raises ValueError for a folder that is none."""
    named = name_folders(folders)
    for folder in named.values():
        if not is_store(folder):
            raise ValueError(f"--store {folder}: no Qlib store, which has calendars/")
    return named


def name_models(names: Iterable[str]) -> dict[str, str]:
    """Name models: those of the zoo by their own names, folders by their last part."""
    zoo = [name for name in names if not Path(name).expanduser().is_dir()]
    folders = name_folders((Path(name) for name in names if Path(name).expanduser().is_dir()), zoo)
    return {name: name for name in zoo} | {name: str(folder) for name, folder in folders.items()}


def names_of(host: str) -> tuple[str, ...]:
    """Return the names that a host to listen on has: none where it stands for every address of this machine."""
    try:
        return () if ip_address(host).is_unspecified else (host,)
    except ValueError:
        return (host,)


def check_token(host: str, token: str | None, named: Collection[str] = ()) -> None:
    """Check that a server which others can reach asks for a token. Raises ValueError.

    Args:
        named: public names and proxies, by which others reach it even at an address of this machine.
    """
    if token is not None and len(token) < LEAST_TOKEN:
        raise ValueError(f"--token has {len(token)} characters; it should have {LEAST_TOKEN} or more, hard to guess")
    if host not in LOOPBACK and token is None:
        raise ValueError(f"--host {host} can be reached from other machines: name a --token that requests must bring")
    if named and token is None:
        raise ValueError(f"{', '.join(named)}: others reach this server so; name a --token that requests must bring")
