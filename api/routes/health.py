"""GET /health, /health/live, /health/ready: three different questions.

live: does this process answer? ready: may a load balancer send requests? progressing: does the engine's loop turn, and
do steps end while there is work? /health is all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.service import Service
from core.errors import QuireError


async def live(service: Service, request: Request) -> Response:
    """200 as long as the event loop turns."""
    return _answer(200, {"live": True})


async def ready(service: Service, request: Request) -> Response:
    """200 when new requests are taken, otherwise 503 with the state."""
    state = await _state(service)
    return _answer(200 if state == "ready" else 503, {"ready": state == "ready", "state": state})


async def health(service: Service, request: Request) -> Response:
    """200 when the server is ready and its engine makes progress."""
    state = await _state(service)
    progressing = state in ("ready", "draining") and service.figures.progressing
    well = state == "ready" and progressing
    facts = {"live": True, "ready": state == "ready", "progressing": progressing, "state": state}
    return _answer(200 if well else 503, facts)


async def _state(service: Service) -> str:
    if service.engine.draining:
        return "draining"
    try:
        return (await service.figures.query()).state
    except QuireError:
        return "failed"  # no supervisor: this process will end too


def _answer(status: int, facts: Mapping[str, object]) -> Response:
    headers = {"cache-control": "no-store"} | ({"retry-after": "1"} if status == 503 else {})
    return Response(msgspec.json.encode(facts), status, headers, "application/json")
