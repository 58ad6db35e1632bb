"""TokenBytes: the bytes that each token stands for, as the tokenizer's decoder describes them.

Two families of tokenizers decode token by token. Byte-level BPE writes bytes as printable stand-ins. SentencePiece
tokens are text with a mark for spaces; with byte fallback, characters outside the vocabulary are runs of byte tokens.
"""

from __future__ import annotations

import re
from typing import Any

_MARK = "\u2581"  # SentencePiece's space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE writes for bytes (Radford et al. 2019), reversed."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in set(plain)]
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTES = _byte_alphabet()


class TokenBytes:
    """Call it with a token id.

    byte_level: every token is a run of bytes, whatever stands beside it.
    pieces: every token is whole text, except byte tokens; `piece` tells.
    Neither: a token's text depends on its neighbours; what is answered here is it alone, for log-probabilities.

    strip_spaces: spaces that decoding drops at the beginning of a sequence.
    strip_first: decoding drops all spaces of a sequence's first token.
    """

    def __init__(self, tokenizer: Any, decoder: dict[str, Any] | None) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[int, str | bytes | None] = {}
        self.byte_level = self.pieces = self.strip_first = self._marked = self._fallback = False
        self.strip_spaces = 0
        steps = _steps(decoder)
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"]:
            self.byte_level = True
        elif kinds == ["Metaspace"] and steps[0].get("replacement", _MARK) == _MARK:
            self.pieces = self._marked = True
            default = "always" if steps[0].get("add_prefix_space", True) else "never"
            self.strip_first = steps[0].get("prepend_scheme", default) != "never"
        else:
            self._read_chain(steps)

    def __call__(self, token_id: int) -> bytes:
        """The bytes that a token stands for; empty for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find(token_id)
        return known

    def piece(self, token_id: int) -> str | bytes | None:
        """In the SentencePiece family: a token's text, or the one byte that a byte token is; None without a token."""
        try:
            return self._pieces[token_id]
        except KeyError:
            token = self._tokenizer.id_to_token(token_id)
            known: str | bytes | None = None
            if token is not None:
                raw = self(token_id)
                known = raw if self._fallback and _BYTE_TOKEN.fullmatch(token) else raw.decode()
            self._pieces[token_id] = known
            return known

    def first_piece(self, token_id: int) -> str:
        """The text of a token that begins a sequence, where strip_first applies."""
        return str(self._tokenizer.id_to_token(token_id)).replace(_MARK, "")

    def _read_chain(self, steps: list[dict[str, Any]]) -> None:
        """SentencePiece as a chain: Replace, ByteFallback, Fuse, Strip, in this order, some left out."""
        rest = list(steps)
        if rest and rest[0].get("type") == "Replace":
            step = rest.pop(0)
            if step.get("pattern") != {"String": _MARK} or step.get("content") != " ":
                return
            self._marked = True
        if rest and rest[0].get("type") == "ByteFallback":
            rest.pop(0)
            self._fallback = True
        if not rest or rest.pop(0).get("type") != "Fuse":
            return  # what follows, or nothing, would work on single tokens
        if rest and rest[0].get("type") == "Strip":
            step = rest.pop(0)
            if step.get("content") != " " or step.get("stop"):
                return
            self.strip_spaces = int(step.get("start") or 0)
        self.pieces = not rest

    def _find(self, token_id: int) -> bytes:
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            try:
                return bytes(_BYTES[character] for character in token)
            except KeyError:  # an added token, written as it is
                return token.encode()
        if self._fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return (token.replace(_MARK, " ") if self._marked else token).encode()


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A decoder as a flat list of its steps."""
    if not decoder:
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for part in decoder.get("decoders", []) for step in _steps(part)]
