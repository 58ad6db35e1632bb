"""RopeSettings: what config.json says of rotary position embeddings, checked and in one form."""

from __future__ import annotations

import math
from typing import Any

# Kind -> the numbers that it cannot do without, and those that have a default.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "longrope": ((), ("factor", "attention_factor")),
}
POSITIVE = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor", "max_position_embeddings")


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """One checked form for both spellings of config.json: rope_parameters, or rope_theta with rope_scaling.

    Raises ValueError naming the key.
    """
    settings: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key) or {}
        if not isinstance(given, dict):
            raise ValueError(f"config.json: {key} must be an object, is {given!r}")
        if any(isinstance(value, dict) for value in given.values()):
            raise ValueError(f"config.json: {key} differs between layers, which no supported architecture does")
        settings |= given
    kind = settings.setdefault("rope_type", settings.get("type", "default"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"rope_scaling: {kind!r} is not supported; supported are {', '.join(KINDS)}")
    longest = config.get("max_position_embeddings")
    # A few checkpoints keep the original length beside the scaling, not in it; there it has precedence.
    original = config.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
    settings |= {"max_position_embeddings": longest, "original_max_position_embeddings": original or longest}
    for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0)):
        if settings.get(key) is None:
            settings[key] = default if config.get(key) is None else config[key]
    needed, optional = KINDS[kind]
    for key in (*needed, *(("max_position_embeddings",) if kind != "default" else ())):
        if settings.get(key) is None:
            raise ValueError(f"rope_scaling: {kind!r} needs a {key}")
    for key in (*needed, *optional, *POSITIVE):
        value = settings.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise ValueError(f"config.json: {key} of the rotation must be a number above 0, is {value!r}")
    if kind == "llama3" and settings["high_freq_factor"] <= settings["low_freq_factor"]:
        raise ValueError("rope_scaling: high_freq_factor must be above low_freq_factor")
    return settings
