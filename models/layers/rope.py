"""Rope: tables of rotary position embeddings (Su et al. 2021) with the context extensions of the checkpoints.

Frequencies depend on the configuration alone, never on the length of a request: cached keys are rotated once. "dynamic"
(NTK-aware) scaling and "longrope", which elsewhere change with the length, are therefore taken at the longest length
served.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def rope_table(settings: dict[str, Any], head_dim: int, num_positions: int) -> torch.Tensor:
    """[num_positions, 2, rotary_dim // 2] float32: cos and sin, times the attention factor of the scaling."""
    dim = int(head_dim * settings["partial_rotary_factor"])
    if dim % 2 or not 0 < dim <= head_dim:
        raise ValueError(f"config.json: {dim} of {head_dim} dimensions of a head cannot be rotated in pairs")
    inverse, factor = _frequencies(settings, dim, num_positions)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inverse
    return torch.stack((angles.cos(), angles.sin()), dim=1) * factor


def _frequencies(settings: dict[str, Any], dim: int, num_positions: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [dim // 2] and the factor on cos and sin."""
    theta = float(settings["rope_theta"])
    powers = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    inverse = 1.0 / theta**powers
    factor = float(settings.get("factor", 1.0))
    original = settings["original_max_position_embeddings"]
    match settings["rope_type"]:
        case "linear":
            return inverse / factor, 1.0
        case "dynamic":
            longest = settings["max_position_embeddings"]
            length = max(num_positions, longest)
            base = theta * (factor * length / longest - (factor - 1)) ** (dim / (dim - 2))
            return 1.0 / base**powers, 1.0
        case "llama3":
            return _llama3(inverse, settings, factor, original), 1.0
        case "yarn":
            return _yarn(inverse, settings, factor, original, dim, theta), _yarn_attention_factor(settings, factor)
        case "longrope":
            name = "long_factor" if num_positions > original else "short_factor"
            return inverse / _factors(settings, name, dim // 2), _longrope_attention_factor(settings, original)
        case _:
            return inverse, 1.0


def _llama3(inverse: torch.Tensor, settings: dict[str, Any], factor: float, original: int) -> torch.Tensor:
    """Slow rotations are slowed by `factor`, fast ones kept, those between blended (Llama 3.1)."""
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    turns = original * inverse / (2 * math.pi)  # rotations within the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * inverse / factor + blend * inverse


def _yarn(
    inverse: torch.Tensor, settings: dict[str, Any], factor: float, original: int, dim: int, theta: float
) -> torch.Tensor:
    """YaRN (Peng et al. 2023): interpolate slow dimensions, keep fast ones, ramp between."""

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(settings.get("beta_fast") or 32.0), dimension(settings.get("beta_slow") or 1.0)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inverse / factor * ramp + inverse * (1 - ramp)


def _yarn_attention_factor(settings: dict[str, Any], factor: float) -> float:
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return scale(settings["mscale"]) / scale(settings["mscale_all_dim"])
    return scale(1.0)


def _factors(settings: dict[str, Any], name: str, count: int) -> torch.Tensor:
    """LongRoPE's own factor of each frequency."""
    values = settings.get(name)
    if not (isinstance(values, list) and len(values) == count and all(isinstance(v, int | float) for v in values)):
        raise ValueError(f"rope_scaling: 'longrope' needs a {name} of {count} numbers")
    return torch.tensor(values, dtype=torch.float32)


def _longrope_attention_factor(settings: dict[str, Any], original: int) -> float:
    """LongRoPE (Ding et al. 2024): grows with the root of the log of the extension."""
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    factor = float(settings.get("factor") or settings["max_position_embeddings"] / original)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
