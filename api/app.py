"""The HTTP door: one table of routes, one error map."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from api.body import RefusedBody
from api.engine_client import ClientGone
from api.gate import Gate
from api.keys import Keys
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


def make_app(service: Service, keys: Keys, cors_origins: Sequence[str] = ()) -> Starlette:
    """The ASGI app over a Service.

    Args:
        keys: what the gate asks for.
        cors_origins: web origins whose pages may call; their preflights come without a key, and end before the gate.
    """

    def refuse(error: QuireError) -> Response:
        service.count_error(error.code)
        return error_response(error)

    middleware = [Middleware(Gate, keys=keys, refuse=refuse)]
    if cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=sorted({method for method, _, _ in ROUTES}),
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=[Route(path, _bound(endpoint, service), methods=[method]) for method, path, endpoint in ROUTES],
        middleware=middleware,
        exception_handlers={
            QuireError: _answering(service, _as_it_is),
            HTTPException: _answering(service, _refused_by_router),
            ClientGone: _client_gone,
            Exception: _answering(service, _unexpected),
        },
    )
    app.router.redirect_slashes = False
    return app


def error_response(error: QuireError) -> Response:
    """An error as HTTP: status, OpenAI's error object, Retry-After or WWW-Authenticate."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.code == "invalid_api_key":
        headers["www-authenticate"] = "Bearer"
    if error.code in ("body_too_large", "invalid_api_key"):
        return RefusedBody(error_body(error), http_status(error.code), headers)
    return Response(error_body(error), http_status(error.code), headers, "application/json")


def _bound(endpoint: Endpoint, service: Service) -> Callable[[Request], Awaitable[ASGIApp]]:
    async def call(request: Request) -> ASGIApp:
        return await endpoint(service, request)

    return call


def _answering(
    service: Service, explain: Callable[[Request, Exception], QuireError]
) -> Callable[[Request, Exception], Response]:
    """An exception handler: what `explain` makes of the exception, counted and written."""

    def answer(request: Request, error: Exception) -> Response:
        told = explain(request, error)
        service.count_error(told.code)
        response = error_response(told)
        if isinstance(error, HTTPException):
            response.headers.update(error.headers or {})  # Allow
        return response

    return answer


def _as_it_is(request: Request, error: Exception) -> QuireError:
    assert isinstance(error, QuireError)
    return error


def _refused_by_router(request: Request, error: Exception) -> QuireError:
    """An unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return QuireError("method_not_allowed", f"{request.method} is not allowed on {path}; use {allowed}")
    if error.status_code == 404:
        return QuireError("not_found", f"there is nothing at {request.method} {path}")
    return QuireError("invalid_request", str(error.detail))


def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _unexpected(request: Request, error: Exception) -> QuireError:
    """A bug of ours. The client learns the request's id, the log learns the rest."""
    request_id = request.scope.get("request_id", "")
    log.error("request %s of %s failed", request_id, request.scope.get("key_holder") or "anybody", exc_info=error)
    return QuireError("internal_error", f"an unexpected error; the server's log has request {request_id}")
