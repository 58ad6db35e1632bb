"""Detokenizer: one choice's token ids to text, piece by piece, never a part of a UTF-8 character.

A character is shown with the token that completes it. What is still open at the end of the sequence becomes U+FFFD, so
that the pieces together are what decoding the whole sequence gives.
"""

from __future__ import annotations

import codecs
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream

from core.text_codec import TextCodec


class Detokenizer(Protocol):
    """Takes ids one by one."""

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        ...

    def flush(self) -> str:
        """What was left open, at the end of the sequence."""
        ...


def new_detokenizer(codec: TextCodec, skip_special_tokens: bool) -> Detokenizer:
    """The fast kind where tokens are bytes, the library's own where their text depends on their neighbours."""
    if codec.byte_level:
        return ByteDetokenizer(codec, skip_special_tokens)
    return StreamDetokenizer(codec, skip_special_tokens)


class ByteDetokenizer:
    """For byte-level tokenizers: a table look-up and an incremental UTF-8 decoder."""

    __slots__ = ("_bytes", "_decoder", "_skipped")

    def __init__(self, codec: TextCodec, skip_special_tokens: bool) -> None:
        self._bytes = codec.token_bytes
        self._skipped = codec.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class StreamDetokenizer:
    """For every other tokenizer: the library's DecodeStream, and the whole sequence once at the end."""

    __slots__ = ("_codec", "_ids", "_shown", "_skip", "_stream")

    def __init__(self, codec: TextCodec, skip_special_tokens: bool) -> None:
        self._codec = codec
        self._skip = skip_special_tokens
        self._stream: Any = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text: str = self._stream.step(self._codec.tokenizer, token_id) or ""
        self._shown += len(text)
        return text

    def flush(self) -> str:
        return self._codec.decode(self._ids, self._skip)[self._shown :]
