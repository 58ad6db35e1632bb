"""Grammar: what StructuredOutputs allows, token by token, as packed masks. Neither torch nor a clock.

The library (llguidance) builds its automata while they are walked, so a grammar costs next to nothing to compile, and
what it may cost is bounded by counts of work, not by time: every rank comes to the same answer.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import llguidance
import numpy as np

from core.errors import QuireError
from core.model_info import ModelInfo
from core.text_codec import TextCodec
from quire import StructuredOutputs

MAX_CHARS = 256 * 1024  # of a schema or grammar
MAX_MULTIPLE = 10_000  # a multipleOf takes as many automaton states as its value, outside of the library's own limits
# Unbounded white space would let a model that is drawn at a high temperature indent for ever.
_JSON: dict[str, Any] = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}
# The worst that was found within these: 0.25 s to compile, 70 ms for a mask, 40 MB. Schemas in use: 1 ms, 20 µs.
_SCHEMA_LIMITS = llguidance.LLParserLimits(max_grammar_size=100_000, step_max_items=10_000, verbose_errors=False)
# A grammar of the client's own may be ambiguous: its cost then grows with the square of what a row holds.
_GRAMMAR_LIMITS = llguidance.LLParserLimits(
    max_grammar_size=100_000, step_max_items=10_000, max_items_in_row=500, verbose_errors=False
)
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([-+.eE0-9]+)')


class _Vocabulary(llguidance.TokenizerWrapper):
    """What the library asks of a tokenizer: every token's bytes; none for ids that only pad the model's vocabulary."""

    def __init__(self, codec: TextCodec, vocab_size: int, eos_id: int) -> None:
        self.eos_token_id = eos_id
        self.bos_token_id = None
        self.tokens = [codec.token_bytes(i) if i < codec.num_ids else b"" for i in range(vocab_size)]
        self.special_token_ids = sorted(i for i in codec.special_ids if i < vocab_size)
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

    @property
    def ended(self) -> bool:
        """Whether nothing can follow but the end of the sequence; also true after an error."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str:
        """Why this sequence cannot go on: a token that was not allowed, or a limit of work; "" when it can."""
        if not self._matcher.is_error():
            return ""
        return str(self._matcher.get_error()).replace("<non-verbose/>", "").strip()[:500] or "unknown error"


class Grammars:
    """Compiles StructuredOutputs for one vocabulary. Raises QuireError unsupported for a model without an end id."""

    def __init__(self, codec: TextCodec, vocab_size: int, eos_ids: list[int]) -> None:
        eos_ids = [token_id for token_id in eos_ids if token_id < vocab_size]
        if not eos_ids:
            text = "structured_outputs needs a model with an end-of-sequence token"
            raise QuireError("unsupported", text, "structured_outputs")
        self._width = -(-vocab_size // 32)
        vocabulary = _Vocabulary(codec, vocab_size, eos_ids[0])
        self._tokenizer = llguidance.LLTokenizer(vocabulary, eos_token=eos_ids)

    def compile(self, wanted: StructuredOutputs) -> Matcher:
        """A Matcher at the beginning. Raises QuireError invalid_grammar naming the field and the reason."""
        field = wanted.source
        try:
            source = _source(wanted)
        except (ValueError, RecursionError) as error:
            raise QuireError("invalid_grammar", f"{field}: {error}", field) from None
        limits = _SCHEMA_LIMITS if wanted.grammar is None else _GRAMMAR_LIMITS
        matcher = Matcher(llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=limits), self._width)
        if not matcher.error:
            matcher.allowed()  # what is too large often shows only here; and later copies find this work done
        if matcher.error:
            raise QuireError("invalid_grammar", f"{field}: {matcher.error}", field)
        return matcher


def load_grammars(model: ModelInfo) -> Grammars:
    """The Grammars of a model's vocabulary; takes 0.3 s at 128k tokens. Raises QuireError."""
    return Grammars(TextCodec(Path(model.path)), model.vocab_size, model.eos_ids)


def _source(wanted: StructuredOutputs) -> str:
    """The library's form of what is wanted. Raises ValueError."""
    given = [wanted.json is not None, wanted.json_object, wanted.regex is not None, wanted.choice is not None]
    if sum([*given, wanted.grammar is not None]) != 1:
        raise ValueError("exactly one of json, json_object, regex, choice and grammar must be set")
    if wanted.choice is not None:
        if not wanted.choice:
            raise ValueError("choice is empty")
        # As one terminal: its automaton has room for thousands of texts, where rules of their own would not.
        quoted = " | ".join(json.dumps(text) for text in wanted.choice)
        return llguidance.LLMatcher.grammar_from_lark(_short(f"start: CHOICE\nCHOICE: {quoted}"))
    if wanted.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(_short(wanted.regex))
    if wanted.grammar is not None:
        if "%json" in wanted.grammar:
            raise ValueError("%json is not supported inside a grammar; use json for a schema")
        return llguidance.grammar_from("grammar", _short(wanted.grammar))
    return llguidance.LLMatcher.grammar_from_json_schema(_schema(wanted), overrides=_JSON)  # type: ignore[arg-type]


def _schema(wanted: StructuredOutputs) -> str:
    """The JSON Schema as a text, without escapes that could hide a keyword."""
    if wanted.json_object:
        return '{"type":"object"}'
    schema = json.loads(_short(wanted.json)) if isinstance(wanted.json, str) else wanted.json
    text = _short(json.dumps(schema))
    for match in _MULTIPLE.finditer(text):
        if _digits(match[1]) > MAX_MULTIPLE:
            raise ValueError(f"multipleOf {match[1][:40]} is too fine or too large; at most {MAX_MULTIPLE} in digits")
    return text


def _digits(number: str) -> int:
    """A number without its decimal point: 2500 for 2.5e3 and 25 for 2.5."""
    mantissa, _, exponent = number.lower().partition("e")
    whole, _, fraction = mantissa.partition(".")
    shift = int(exponent or 0) - len(fraction)
    if abs(shift) > 20:
        return MAX_MULTIPLE + 1
    digits = int(f"{whole}{fraction}".lstrip("+-") or "0")
    return digits * int("1" + "0" * max(0, shift))


def _short(text: str) -> str:
    if len(text) > MAX_CHARS:
        raise ValueError(f"{len(text)} characters are too many; at most {MAX_CHARS}")
    return text
