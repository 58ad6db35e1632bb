"""GET /v1/models and /v1/models/{model}."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.schema.models import ModelList, model_card
from api.service import Service


async def list_models(service: Service, request: Request) -> Response:
    """The served models."""
    return Response(msgspec.json.encode(ModelList([model_card(service.model)])), media_type="application/json")


async def get_model(service: Service, request: Request) -> Response:
    """One model, by its name."""
    service.model.check_name(request.path_params["model"])
    return Response(msgspec.json.encode(model_card(service.model)), media_type="application/json")
