"""GET /v1/models."""

from __future__ import annotations

import msgspec

from api.served import ServedModel


class ModelCard(msgspec.Struct):
    """OpenAI's model object, and the longest context."""

    id: str
    created: int
    max_model_len: int
    root: str
    object: str = "model"
    owned_by: str = "quire"


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: str = "list"


def model_card(model: ServedModel) -> ModelCard:
    return ModelCard(model.name, model.created, model.limits.max_model_len, model.engine)
