"""Errors as users see them: problem details of RFC 9457, a sentence without a stack."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from kronos_qlib.text import printable

MEDIA_TYPE = "application/problem+json"
_LONGEST = 600  # characters of a sentence


class Problem(Exception):
    """A request that cannot be served: status, a sentence that a user understands, headers, and more members."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.status, self.detail = status, printable(" ".join(detail.split()))[:_LONGEST]
        self.headers = dict(headers or {})
        self.members = members

    def content(self) -> dict[str, Any]:
        """Return the members of the problem."""
        title = HTTPStatus(self.status).phrase
        return {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail, **self.members}

    def body(self) -> bytes:
        """Return the problem as JSON."""
        return json.dumps(self.content(), ensure_ascii=False).encode()
