"""ServedModel: what the doors know of the model behind them."""

from __future__ import annotations

import msgspec

from core.errors import QuireError
from core.sampling import SamplingLimits
from quire import SamplingParams


class ServedModel(msgspec.Struct, frozen=True):
    """`name` is what clients call it, `engine` what the processes do ("name@revision"). `created` is a Unix time.

    `defaults` are the sampling parameters of a request that leaves them out.
    """

    name: str
    engine: str
    created: int
    limits: SamplingLimits
    defaults: SamplingParams = SamplingParams()
    max_prompts: int = 2048  # in one completions request

    def check_name(self, name: str | None) -> None:
        """Refuse a request for another model. No name means this one."""
        if name is not None and name not in (self.name, self.engine):
            text = f"model: {name[:200]!r} is not served here; the served model is {self.name!r}"
            raise QuireError("model_not_found", text, "model")
