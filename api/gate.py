"""Gate: names each request, and checks its key where the server has keys."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.keys import Keys
from core.errors import QuireError

OPEN_PATHS = ("/health", "/health/live", "/health/ready")  # for probes, which have no key
_MAX_ID_CHARS = 128


class Gate:
    """Wraps the app: `x-request-id` is taken from the request or made, and returned.

    In the scope, `request_id` is that id, and `key_holder` whose key came along (None: the server has no keys, or the
    path needs none).

    Args:
        keys: accepted in `Authorization: Bearer KEY` and in `x-api-key: KEY`.
        refuse: makes the answer to a request without a valid key.
    """

    def __init__(self, app: ASGIApp, keys: Keys, refuse: Callable[[QuireError], ASGIApp]) -> None:
        self._app = app
        self._keys = keys
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id", b""))
        scope["request_id"] = request_id.decode()
        scope["key_holder"] = None

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        app = self._app
        if self._keys.required and scope["path"] not in OPEN_PATHS:
            scope["key_holder"] = self._holder(headers)
            if scope["key_holder"] is None:
                text = "the API key is missing or wrong; send Authorization: Bearer KEY"
                app = self._refuse(QuireError("invalid_api_key", text))
        await app(scope, receive, send_named)

    def _holder(self, headers: dict[bytes, bytes]) -> str | None:
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer" and (holder := self._keys.holder(token.strip())) is not None:
            return holder
        return self._keys.holder(headers[b"x-api-key"]) if b"x-api-key" in headers else None


def _request_id(given: bytes) -> bytes:
    """The client's id where it is short, printable ASCII; one of our own otherwise."""
    if 0 < len(given) <= _MAX_ID_CHARS and all(32 < byte < 127 for byte in given):
        return given
    return uuid.uuid4().hex.encode()
