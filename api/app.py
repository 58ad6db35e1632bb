"""The HTTP door: one table of routes, one error map."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from api.body import RefusedBody
from api.engine_client import ClientGone
from api.gate import Gate
from api.routes.chat import chat_completions
from api.routes.completions import completions
from api.routes.health import health, live, ready
from api.routes.metrics import metrics
from api.routes.models import get_model, list_models
from api.routes.stats import stats
from api.routes.version import version
from api.schema.errors import error_body
from api.service import Service
from core.errors import QuireError, http_status

log = logging.getLogger("quire.api")

Endpoint = Callable[[Service, Request], Awaitable[ASGIApp]]

ROUTES: list[tuple[str, str, Endpoint]] = [
    ("GET", "/v1/models", list_models),
    ("GET", "/v1/models/{model:path}", get_model),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/chat/completions", chat_completions),
    ("GET", "/health", health),
    ("GET", "/health/live", live),
    ("GET", "/health/ready", ready),
    ("GET", "/version", version),
    ("GET", "/metrics", metrics),
    ("GET", "/stats", stats),
]


def make_app(service: Service, *, keys: Sequence[str] = ()) -> Starlette:
    """The ASGI app over a Service."""
    app = Starlette(
        routes=[Route(path, _bound(endpoint, service), methods=[method]) for method, path, endpoint in ROUTES],
        middleware=[Middleware(Gate, keys=keys)],
        exception_handlers={
            QuireError: _quire_error,
            HTTPException: _http_error,
            ClientGone: _client_gone,
            Exception: _unexpected,
        },
    )
    app.router.redirect_slashes = False
    return app


def error_response(error: QuireError) -> Response:
    """An error as HTTP: status, OpenAI's error object, Retry-After."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return Response(error_body(error), http_status(error.code), headers, "application/json")


def _bound(endpoint: Endpoint, service: Service) -> Callable[[Request], Awaitable[ASGIApp]]:
    async def call(request: Request) -> ASGIApp:
        return await endpoint(service, request)

    return call


def _quire_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, QuireError)
    response = error_response(error)
    if error.code == "body_too_large":
        return RefusedBody(error_body(error), response.status_code)
    return response


def _http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = ", ".join(method for method, path, _ in ROUTES if path == request.url.path)
        text = f"{request.method} is not allowed on {request.url.path}; use {allowed or 'another method'}"
        response = error_response(QuireError("method_not_allowed", text))
        response.headers["allow"] = (error.headers or {}).get("Allow", allowed)
        return response
    if error.status_code == 404:
        text = f"there is nothing at {request.method} {request.url.path[:200]}"
        return error_response(QuireError("not_found", text))
    return error_response(QuireError("invalid_request", str(error.detail)))


def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _unexpected(request: Request, error: Exception) -> Response:
    """A bug of ours. The client learns the request's id, the log learns the rest."""
    request_id = request.scope.get("request_id", "")
    log.error("request %s failed", request_id, exc_info=error)
    return error_response(
        QuireError("internal_error", f"an unexpected error; the server's log has request {request_id}")
    )
