"""ModelConfig: config.json's keys, checked once; model files read what they need of it."""

from __future__ import annotations

from typing import Any

from core.errors import QuireError


class ModelConfig:
    """Typed look-ups in a checkpoint's config.json. Raises QuireError model_invalid naming the key."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.values.get(key, default)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise QuireError("model_invalid", f"config.json: {key} must be a positive integer, is {value!r}", "model")
        return value

    def number(self, key: str, default: float) -> float:
        """A number."""
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise QuireError("model_invalid", f"config.json: {key} must be a number, is {value!r}", "model")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """A truth value."""
        value = self.values.get(key, default)
        return default if value is None else bool(value)

    def require(self, key: str, *allowed: Any) -> None:
        """Refuse a variation that is not implemented."""
        value = self.values.get(key, allowed[0])
        if value not in allowed:
            text = f"config.json: {key} {value!r} is not supported; supported: {', '.join(map(str, allowed))}"
            raise QuireError("model_invalid", text, "model")
