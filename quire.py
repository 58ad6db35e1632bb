"""Quire's public Python face: the client protocol, `Client`, `AsyncClient` and the offline `LLM`.

One self-contained file that needs only msgspec and pyzmq: it may be copied into any program. The server imports the
protocol's structs from here, so that both ends speak from one definition.
"""

from __future__ import annotations

import msgspec

PROTOCOL_VERSION = 1


class QuireError(Exception):
    """An error with a stable code, as every door of the server reports it.

    Attributes:
        code: stable, machine-readable (the table is in core/errors.py), e.g. "context_length_exceeded".
        message: one sentence that names the field, the value and the fix.
        param: the request field at fault, or None.
        retry_after_s: seconds after which trying again makes sense, or None.
    """

    def __init__(self, code: str, message: str, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How tokens are chosen and when a sequence ends. `core.sampling.validate` checks the ranges.

    temperature 0 is greedy. top_k 0 and top_p 1 and min_p 0 mean "off". Penalties as OpenAI (presence, frequency, over
    output tokens) and as Hugging Face (repetition, over prompt and output). `logprobs`/`prompt_logprobs`: number of
    alternatives (0: the chosen token's only), None: off. `seed` None: the server draws one.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
