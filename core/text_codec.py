"""TextCodec: text to token ids and back, over a checkpoint's tokenizer.json (the `tokenizers` library)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from core.errors import QuireError


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE writes for bytes (Radford et al. 2019), reversed."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in set(plain)]
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTES = _byte_alphabet()


class TextCodec:
    """A tokenizer, its special tokens, and the bytes of each token.

    byte_level: every token is a run of bytes whatever stands beside it, so ids decode one by one.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        try:
            self.tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
            description = json.loads(path.read_text())
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise QuireError("model_invalid", f"cannot read {path}: {error}", "model") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        decoder = description.get("decoder") or {}
        self.byte_level = decoder.get("type") == "ByteLevel"
        self._metaspace = "\u2581" if "\u2581" in json.dumps(decoder, ensure_ascii=False) else ""
        self.special_ids = {token["id"] for token in description.get("added_tokens", []) if token["special"]}
        self.num_ids: int = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """Token ids of `text`; with `special_tokens` also those that the tokenizer's post-processor adds."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Text of a whole sequence."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; empty for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself; U+FFFD where it holds a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _find_bytes(self, token_id: int) -> bytes:
        token: str | None = self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            try:
                return bytes(_BYTES[character] for character in token)
            except KeyError:  # an added token, written as it is
                return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return (token.replace(self._metaspace, " ") if self._metaspace else token).encode()
