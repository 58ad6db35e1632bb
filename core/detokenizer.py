"""Detokenizer: one choice's token ids to text, piece by piece, never a part of a UTF-8 character.

A character is shown with the token that completes it, and what can no longer become one is shown as U+FFFD. The pieces
together are what decoding the whole sequence gives. Each token costs the same, however long the sequence is.
"""

from __future__ import annotations

import codecs
from typing import Protocol

from core.text_codec import TextCodec

REPLACEMENT = "\ufffd"
# Tokens that may wait for a character to be completed; four bytes make the longest one.
MAX_WAITING = 8


class Detokenizer(Protocol):
    """Takes ids one by one."""

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        ...

    def flush(self) -> str:
        """What was left open, at the end of the sequence."""
        ...


def new_detokenizer(codec: TextCodec, skip_special_tokens: bool) -> Detokenizer:
    """The kind that fits the tokenizer: a table look-up where tokens stand for themselves."""
    if codec.token_bytes.byte_level:
        return ByteDetokenizer(codec, skip_special_tokens)
    if codec.token_bytes.pieces:
        return PieceDetokenizer(codec, skip_special_tokens)
    return WindowDetokenizer(codec, skip_special_tokens)


class ByteDetokenizer:
    """For byte-level tokenizers: a table look-up and an incremental UTF-8 decoder."""

    __slots__ = ("_bytes", "_decode", "_skipped")

    def __init__(self, codec: TextCodec, skip_special_tokens: bool) -> None:
        self._bytes = codec.token_bytes
        self._skipped = codec.special_ids if skip_special_tokens else frozenset()
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decode(self._bytes(token_id))

    def flush(self) -> str:
        return self._decode(b"", True)


class PieceDetokenizer:
    """For SentencePiece tokenizers: tokens are text, and runs of byte tokens spell what the vocabulary lacks.

    The library turns a run that is not valid UTF-8 into one U+FFFD per byte. So does this, except for characters that
    the run had completed before its first wrong byte: those were shown already.
    """

    __slots__ = ("_bad", "_first", "_open", "_skipped", "_strip", "_tokens")

    def __init__(self, codec: TextCodec, skip_special_tokens: bool) -> None:
        self._tokens = codec.token_bytes
        self._skipped = codec.special_ids if skip_special_tokens else frozenset()
        self._strip = self._tokens.strip_spaces
        self._first = self._tokens.strip_first
        self._open = b""  # bytes of a character to be
        self._bad = False  # the present run of bytes is known not to be UTF-8

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._tokens.piece(token_id)
        if type(piece) is bytes:
            self._first = False
            text = self._push_byte(piece)
        elif type(piece) is str:
            text = piece
            if self._first:
                self._first = False
                text = self._tokens.first_piece(token_id)
            if self._open or self._bad:
                text = self._end_run() + text
        else:
            return ""
        return self._stripped(text) if self._strip else text

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _push_byte(self, byte: bytes) -> str:
        if self._bad:
            return REPLACEMENT
        self._open += byte
        try:
            text = self._open.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            self._bad = True
            text = REPLACEMENT * len(self._open)
        self._open = b""
        return text

    def _end_run(self) -> str:
        text = REPLACEMENT * len(self._open)
        self._open = b""
        self._bad = False
        return text

    def _stripped(self, text: str) -> str:
        """Without the spaces that decoding drops at the beginning of a sequence."""
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class WindowDetokenizer:
    """For every other tokenizer (WordPiece, …): decodes the last few tokens with and without the new one."""

    __slots__ = ("_codec", "_ids", "_known", "_shown", "_skipped")

    def __init__(self, codec: TextCodec, skip_special_tokens: bool) -> None:
        self._codec = codec
        self._skipped = codec.special_ids if skip_special_tokens else frozenset()
        self._ids: list[int] = []  # the window: tokens that are shown, as context, then those that are not yet
        self._known = 0  # tokens of the window that are shown
        self._shown = 0  # characters of the window that are shown

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or self._codec.token_bytes.piece(token_id) is None:
            return ""
        self._ids.append(token_id)
        text = self._codec.decode(self._ids, False)
        whole = text.rstrip(REPLACEMENT)
        waiting = len(self._ids) - self._known
        if len(whole) < len(text) and waiting < MAX_WAITING:
            fresh = whole[self._shown :]
            self._shown = max(self._shown, len(whole))
            return fresh
        fresh = text[self._shown :]
        # The tokens that were new become the context of those to come.
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        self._shown = len(self._codec.decode(self._ids, False))
        return fresh

    def flush(self) -> str:
        return self._codec.decode(self._ids, False)[self._shown :]
