"""Reading a request's body: bounded, whatever the client announces."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.engine_client import ClientGone
from core.errors import QuireError

_MAX_DISCARDED_BYTES = 64 * 1024 * 1024
_DISCARD_S = 5.0


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes. Raises QuireError("body_too_large"), and ClientGone."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced[:20]) > limit:
        raise _too_large(limit)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise QuireError("unsupported", f"Content-Encoding {encoding[:40]!r} is not supported; send the body as it is")
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


def _too_large(limit: int) -> QuireError:
    return QuireError("body_too_large", f"the body is larger than {limit} bytes (--max-body-bytes)")


class RefusedBody(Response):
    """The answer to a body that is not read. What the client still sends is thrown away for a moment: closing at once
    would reset the connection, and many clients would never see the answer."""

    def __init__(self, content: bytes, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(content, status, {**headers, "connection": "close"}, "application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        discarded = 0
        try:
            async with asyncio.timeout(_DISCARD_S):
                while discarded < _MAX_DISCARDED_BYTES:
                    message = await receive()
                    discarded += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
