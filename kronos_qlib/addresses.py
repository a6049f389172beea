"""Servers by their address: whether one answers, before a library would try for minutes."""

import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def check_answers(uri: str, seconds: float) -> None:
    """Connect to the server of an address, and leave it at that. An address without a host is no server: it passes.

    Raises:
        ConnectionError: it does not answer in so many seconds; where a web proxy stands between, nothing is tried.
        ValueError: the text is no address.
    """
    address = urlsplit(uri)
    kind = address.scheme.partition("+")[0]
    host, port = address.hostname, address.port or _PORTS.get(kind)
    if not host or not port or (kind in getproxies() and not proxy_bypass(host)):
        return
    problem: list[str] = [f"no answer within {seconds:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            problem.clear()
        except OSError as error:
            problem[:] = [str(error)]

    thread = threading.Thread(target=connect, daemon=True)  # to look up a name may take longer, and has no limit
    thread.start()
    thread.join(seconds)
    if problem:
        raise ConnectionError(f"{host} cannot be reached ({problem[0]})")
