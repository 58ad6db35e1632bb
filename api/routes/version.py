"""GET /version."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.service import Service


async def version(service: Service, request: Request) -> Response:
    """The server's version."""
    return Response(msgspec.json.encode({"version": service.version}), media_type="application/json")
