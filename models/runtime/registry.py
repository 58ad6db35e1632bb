"""Registry: which file serves which architecture. A literal table; adding a model is its file and one line here."""

from __future__ import annotations

import importlib
from typing import Any

from core.errors import QuireError

MODELS = {
    "llama": "models.llama",
    "mistral": "models.mistral",
    "qwen2": "models.qwen2",
    "qwen3": "models.qwen3",
}


def find(config: dict[str, Any]) -> Any:
    """The model module for a config.json.

    Raises QuireError model_invalid for an architecture that is not supported, with those that are.
    """
    model_type = config.get("model_type")
    supported = ", ".join(MODELS)
    if not isinstance(model_type, str) or model_type not in MODELS:
        text = f"the architecture {model_type!r} is not supported; supported are {supported}"
        raise QuireError("model_invalid", text, "model")
    module = importlib.import_module(MODELS[model_type])
    architectures = config.get("architectures") or list(module.ARCHITECTURES)
    if not isinstance(architectures, list) or not any(name in module.ARCHITECTURES for name in architectures):
        named = ", ".join(map(str, architectures)) if isinstance(architectures, list) else repr(architectures)
        text = f"{named} is not supported; of {model_type}, {', '.join(module.ARCHITECTURES)} is"
        raise QuireError("model_invalid", text, "model")
    return module
