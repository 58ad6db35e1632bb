"""ExactText: texts that a tokenizer encodes to an exact number of tokens, for doors that take no token ids."""

from __future__ import annotations

import functools
import itertools
import random

from tokenizers import Tokenizer

from core.errors import QuireError

_MAX_WORDS = 4096  # enough for prompts that share nothing by chance
_TRIES = 16


class ExactText:
    """Draws words that are one token each. Make it with `load`: reading a large vocabulary takes a second."""

    def __init__(self, path: str) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exception
            raise QuireError("invalid_config", f"--tokenizer: cannot read {path}: {error}", "tokenizer") from None
        self._words = list(itertools.islice(self._find_words(), _MAX_WORDS))
        if len(self._words) < 16:
            raise QuireError("invalid_config", f"--tokenizer: {path} has no words that are single tokens", "tokenizer")

    @staticmethod
    @functools.cache
    def load(path: str) -> ExactText:
        """The one ExactText of a tokenizer.json in this process."""
        return ExactText(path)

    def count(self, text: str) -> int:
        """Tokens of `text`, without special ones."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def draw(self, rng: random.Random, num_tokens: int) -> str:
        """A text of exactly `num_tokens` tokens, words with a space between; it neither begins nor ends with one."""
        words = rng.choices(self._words, k=num_tokens)
        for _ in range(_TRIES):
            count = self.count(" ".join(words))
            if count == num_tokens:
                return " ".join(words)
            # Only the first word stands without a space before it, and may then be more than one token.
            words = words[:num_tokens] if count > num_tokens else words + rng.choices(self._words, k=1)
            words[0] = rng.choice(self._words)
        raise QuireError("invalid_config", f"--tokenizer: found no text of exactly {num_tokens} tokens", "tokenizer")

    def _find_words(self) -> itertools.chain[str]:
        """Words that stay one token after a space, those first that are one token alone too."""
        inside: list[str] = []
        alone: list[str] = []
        for token_id in range(self._tokenizer.get_vocab_size()):
            word = self._tokenizer.decode([token_id]).strip()
            if len(word) > 1 and word.isascii() and word.isalpha() and self.count(f"a {word}") == self.count("a") + 1:
                (alone if self.count(word) == 1 else inside).append(word)
        return itertools.chain(dict.fromkeys(alone), () if len(alone) >= 16 else dict.fromkeys(inside))
