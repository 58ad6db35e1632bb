"""TextCodec: text to token ids and back, over a checkpoint's tokenizer.json (the `tokenizers` library)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from core.errors import QuireError
from core.token_bytes import TokenBytes


class TextCodec:
    """A tokenizer, its special tokens, and the bytes of each token. Raises QuireError model_invalid when unreadable."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        try:
            self.tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
            description = json.loads(path.read_bytes())
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise QuireError("model_invalid", f"cannot read {path}: {error}", "model") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        added = description.get("added_tokens") or []
        self._tokens: dict[int, tuple[str, bytes]] = {}
        self.token_bytes = TokenBytes(self.tokenizer, description.get("decoder"))
        self.special_ids = frozenset(token["id"] for token in added if token["special"])
        self.num_ids: int = self.tokenizer.get_vocab_size(with_added_tokens=True)
        # Only where each token is its own bytes, and nothing else is taken from the text, does length say anything.
        exact = self.token_bytes.byte_level and not description.get("normalizer")
        if exact and not any(token.get("lstrip") or token.get("rstrip") for token in added):
            self._longest_token = max(len(token.encode()) for token in self.tokenizer.get_vocab(True))
        else:
            self._longest_token = 0

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """Token ids of `text`; with `special_tokens` also those that the tokenizer's post-processor adds.

        Raises QuireError for text that is not Unicode (a lone surrogate, which JSON can spell).
        """
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special_tokens).ids
        except TypeError:
            raise QuireError(
                "invalid_value", "the prompt holds a lone surrogate (\\ud800 to \\udfff)", "prompt"
            ) from None
        return ids

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the tokens of `text`, without encoding it."""
        return len(text) // self._longest_token if self._longest_token else 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Text of a whole sequence."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> tuple[str, bytes]:
        """One token by itself: its text, with U+FFFD where it holds a part of a character, and its bytes."""
        known = self._tokens.get(token_id)
        if known is None:
            raw = self.token_bytes(token_id)
            known = self._tokens[token_id] = (raw.decode("utf-8", "replace"), raw)
        return known
