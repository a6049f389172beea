"""What every request passes before it reaches the API: host, origin, token, size; and the headers of every answer."""

import asyncio
import hmac
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from uvicorn.protocols.http.h11_impl import H11Protocol

from kronos_qlib.web.problems import MEDIA_TYPE, Problem
from kronos_qlib.web.settings import LOOPBACK, ServerSettings

logger = logging.getLogger("qlib.KronosWeb")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# plotly makes an empty style element and adds rules to it: this is the digest of the empty text, no other style passes
_EMPTY = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
PAGE_POLICY = (
    f"default-src 'none'; script-src 'self'; style-src 'self' {_EMPTY}; img-src 'self' data: blob:; "
    "connect-src 'self'; frame-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# A report is a page of its own with its scripts inside: sandboxed it has no origin, and it may ask nobody for anything.
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
_SAFE = ("GET", "HEAD")


class PunctualProtocol(H11Protocol):
    """uvicorn's protocol, which closes a connection on which no request comes whole, or no answer is taken."""

    seconds = 30.0
    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._wait(True)

    def data_received(self, data: bytes) -> None:
        """Go on waiting unless a request is being answered."""
        super().data_received(data)
        self._wait(self.cycle is None or self.cycle.response_complete)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._wait(False)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to wait for the client to take what was sent."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: it has taken some."""
        if self._stalled is not None:
            self._stalled.cancel()
        super().resume_writing()

    def _wait(self, waits: bool) -> None:
        if waits and self._deadline is None:
            self._deadline = self.loop.call_later(self.seconds, self.transport.close)
        elif not waits and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Safety:
    """ASGI middleware that refuses what a browser of another site, or somebody without the token, might send."""

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self.app, self.settings = app, settings
        self._hosts = {*LOOPBACK, *(name.lower() for name in settings.hosts)}
        self._serving = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve a request, or answer it with a problem."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        sent, policy = False, REPORT_POLICY if _is_report(scope["path"]) else PAGE_POLICY

        async def send_safely(message: Message) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                sent = True
                given = {name.lower() for name, _ in message.get("headers", [])}
                added = _HEADERS | {"content-security-policy": policy, "cache-control": "no-store"}
                more = [(name.encode(), value.encode()) for name, value in added.items() if name.encode() not in given]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        async def send_unless_refused(message: Message) -> None:
            if not refused:  # what the API makes of a body that was cut short is not the answer
                await send_safely(message)

        refused: list[Problem] = []
        self._serving += 1
        try:
            self._check(scope)
            await self.app(scope, self._limited(scope, receive, refused), send_unless_refused)
            if refused:
                raise refused[0]
        except Problem as problem:
            if not sent:
                await _answer(problem, scope, send_safely)
        except (asyncio.CancelledError, OSError):
            raise
        except Exception:  # whatever it is, its stack is for the log alone
            logger.exception(f"{scope['method']} {scope['path']} failed")
            if not sent:
                await _answer(Problem(500, "Something failed here; the server's log says what."), scope, send_safely)
        finally:
            self._serving -= 1

    def _check(self, scope: Message) -> None:
        if self._serving > self.settings.limits.requests:
            raise Problem(503, "Too many requests are being served; ask again in a few seconds.", {"Retry-After": "5"})
        headers = {name.lower(): value for name, value in scope["headers"]}
        if sum(name.lower() == b"host" for name, _ in scope["headers"]) != 1:
            raise Problem(400, "A request must name one host.")
        host = headers[b"host"].decode("latin-1").lower()
        self._check_host(host)
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host:
            raise Problem(403, "This request comes from a page of another site, which may not use this server.")
        if headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site") and (
            scope["method"] not in _SAFE or scope["path"].startswith("/api")
        ):
            raise Problem(403, "This request comes from a page of another site, which may not use this server.")
        # a frame sends no token: the address of a report has its job's id in it, which nobody can guess
        if scope["path"].startswith("/api") and self.settings.token is not None and not _is_report(scope["path"]):
            said = headers.get(b"authorization", b"")
            if not hmac.compare_digest(said, f"Bearer {self.settings.token}".encode()):
                raise Problem(
                    401, "This server asks for the token that it was started with.", {"WWW-Authenticate": "Bearer"}
                )

    def _check_host(self, host: str) -> None:
        try:
            place = urlsplit(f"//{host}")
            name, port = place.hostname, place.port
        except ValueError:
            name, port = None, None
        own_port = self.settings.port in (0, port or 80) or name not in LOOPBACK
        known = (name in self._hosts and own_port) or host in self._hosts
        if not known or place.username is not None:
            raise Problem(
                421, "This server is not called so; open it by the address that it printed, or name --public-name."
            )

    def _limited(self, scope: Message, receive: Receive, refused: list[Problem]) -> Receive:
        """Return a `receive` that ends a body which is too large, or whose next piece does not come, and says why."""
        limits = self.settings.limits
        most = limits.upload_bytes if scope["path"] == "/api/uploads" else limits.request_bytes
        declared = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"0")
        too_large = Problem(413, f"The request has more than {most:,} bytes, which is the most here.")
        if not declared.isdigit() or int(declared) > most:
            raise too_large
        received, complete = 0, False

        async def receive_limited() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()  # waits until the client has gone
            try:
                message = await asyncio.wait_for(receive(), limits.seconds)
            except asyncio.TimeoutError:
                refused.append(Problem(408, f"Nothing came for {limits.seconds:g} seconds.", {"Connection": "close"}))
                raise refused[0] from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > most:
                refused.append(too_large)
                raise too_large
            return message

        return receive_limited


def _is_report(path: str) -> bool:
    return re.fullmatch(r"/api/comparisons/[\w-]+/report", path) is not None


async def _answer(problem: Problem, scope: Message, send: Send) -> None:
    body = problem.body()
    headers = {"Content-Type": MEDIA_TYPE, "Content-Length": str(len(body)), **problem.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": encoded})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
