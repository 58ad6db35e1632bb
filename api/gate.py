"""Gate: the one middleware. It names each request, and checks its key where the server has keys."""

from __future__ import annotations

import hmac
import logging
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.schema.errors import error_body
from core.errors import QuireError, http_status

log = logging.getLogger("quire.api")

_OPEN_PATHS = ("/health", "/health/live", "/health/ready")  # for probes, which have no key
_MAX_ID_CHARS = 128


class Gate:
    """Wraps the app: `x-request-id` is taken from the request or made, and returned.

    Args:
        keys: accepted API keys (`Authorization: Bearer KEY`); empty lets everybody in.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str] = ()) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id", b""))
        scope["request_id"] = request_id.decode()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        if self._keys and scope["path"] not in _OPEN_PATHS and not self._admits(headers.get(b"authorization", b"")):
            error = QuireError("invalid_api_key", "the API key is missing or wrong; send Authorization: Bearer KEY")
            body = error_body(error)
            head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            start = {"type": "http.response.start", "status": http_status(error.code), "headers": head}
            await send_named(start)
            await send({"type": "http.response.body", "body": body})
            return
        await self._app(scope, receive, send_named)

    def _admits(self, authorization: bytes) -> bool:
        kind, _, key = authorization.partition(b" ")
        # Every key is compared, each in constant time: the time taken tells nothing.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return kind.lower() == b"bearer" and any(matches)


def _request_id(given: bytes) -> bytes:
    """The client's id where it is short, printable ASCII; one of our own otherwise."""
    if 0 < len(given) <= _MAX_ID_CHARS and all(32 < byte < 127 for byte in given):
        return given
    return uuid.uuid4().hex.encode()
