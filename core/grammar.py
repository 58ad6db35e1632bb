"""Grammar: what StructuredOutputs allows, token by token, as packed masks. Neither torch nor a clock.

The library (llguidance) builds its automata while they are walked, so a grammar costs next to nothing to compile, and
what it may cost is bounded by counts of work, not by time: every rank comes to the same answer.
"""

from __future__ import annotations

import json
from typing import Any

import llguidance
import numpy as np

from core.errors import QuireError
from core.text_codec import TextCodec
from quire import StructuredOutputs

MAX_CHARS = 256 * 1024  # of a schema or grammar
# Unbounded white space would let a model that is drawn at a high temperature indent for ever.
_JSON: dict[str, Any] = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}
_LIMITS = llguidance.LLParserLimits(verbose_errors=False)


class _Vocabulary(llguidance.TokenizerWrapper):
    """What the library asks of a tokenizer: every token's bytes."""

    def __init__(self, codec: TextCodec, eos_id: int) -> None:
        self.eos_token_id = eos_id
        self.bos_token_id = None
        self.tokens = [codec.token_bytes(token_id) for token_id in range(codec.num_ids)]
        self.special_token_ids = sorted(codec.special_ids)
        self.is_tokenizer_wrapper = True
        self._codec = codec

    def __call__(self, text: bytes | str) -> list[int]:
        return self._codec.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"), False)


class Matcher:
    """One sequence's place in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, width: int) -> None:
        self._matcher = matcher
        self._width = width

    def copy(self) -> Matcher:
        """Another sequence at the same place."""
        return Matcher(self._matcher.deep_copy(), self._width)

    def take(self, token_ids: list[int]) -> bool:
        """Go on by these tokens; False when the grammar does not allow them."""
        # One by one: given several, the library refuses the end-of-sequence token of a finished text.
        return all(self._matcher.consume_token(token_id) for token_id in token_ids)

    def allowed(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """[ceil(vocab / 32)] int32, bit i % 32 of word i // 32 for id i; after the end, end-of-sequence ids alone."""
        mask = np.zeros(self._width, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask

    @property
    def complete(self) -> bool:
        """Whether the text so far is a whole one."""
        return bool(self._matcher.is_accepting())


class Grammars:
    """Compiles StructuredOutputs for one vocabulary. Raises QuireError unsupported for a model without an end id."""

    def __init__(self, codec: TextCodec, vocab_size: int, eos_ids: list[int]) -> None:
        if not eos_ids:
            text = "structured_outputs needs a model with an end-of-sequence token"
            raise QuireError("unsupported", text, "structured_outputs")
        self._width = -(-vocab_size // 32)
        vocabulary = _Vocabulary(codec, eos_ids[0])
        self._tokenizer = llguidance.LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=eos_ids)

    def compile(self, wanted: StructuredOutputs) -> Matcher:
        """A Matcher at the beginning. Raises QuireError invalid_grammar naming the field and the reason."""
        field = wanted.source
        try:
            source = _source(wanted)
        except (ValueError, RecursionError) as error:
            raise QuireError("invalid_grammar", f"{field}: {error}", field) from None
        matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise QuireError("invalid_grammar", f"{field}: {matcher.get_error()[:500]}", field)
        return Matcher(matcher, self._width)


def _source(wanted: StructuredOutputs) -> str:
    """The library's form of what is wanted. Raises ValueError."""
    given = [wanted.json is not None, wanted.json_object, wanted.regex is not None, wanted.choice is not None]
    if sum([*given, wanted.grammar is not None]) != 1:
        raise ValueError("exactly one of json, json_object, regex, choice and grammar must be set")
    schema: Any = wanted.json
    if wanted.json_object:
        schema = {"type": "object"}
    elif wanted.choice is not None:
        if not wanted.choice:
            raise ValueError("choice is empty")
        quoted = " | ".join(json.dumps(text) for text in wanted.choice)
        return llguidance.LLMatcher.grammar_from_lark(_short(f"start: {quoted}"))
    elif wanted.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(_short(wanted.regex))
    elif wanted.grammar is not None:
        return llguidance.grammar_from("grammar", _short(wanted.grammar))
    text = _short(schema if isinstance(schema, str) else json.dumps(schema))
    return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_JSON)  # type: ignore[arg-type]


def _short(text: str) -> str:
    if len(text) > MAX_CHARS:
        raise ValueError(f"{len(text)} characters are too many; at most {MAX_CHARS}")
    return text
