"""Detokenization: the pieces are the whole, no character is split, and none that is complete is held back."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from core.detokenizer import new_detokenizer
from core.model_info import BUILTIN
from core.text_codec import TextCodec

TEXTS = [
    "plain words",
    "naïve café",
    "日本語のテキスト",
    "emoji 👩‍👩‍👧‍👦 and 🇭🇺",
    "tabs\tand\nlines",
    "mixed 数字 123 Ω≈ç√",
]


@pytest.fixture(scope="module")
def byte_codec() -> TextCodec:
    return TextCodec(BUILTIN["tiny-chat"])


@pytest.fixture(scope="module")
def metaspace_codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """A SentencePiece-like tokenizer with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁hello", "▁world", "a", "b", "c", "ing", "é", "日"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    folder = tmp_path_factory.mktemp("metaspace")
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextCodec(folder)


def pieces_of(codec: TextCodec, ids: list[int], skip: bool) -> list[str]:
    detokenizer = new_detokenizer(codec, skip)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**9), st.booleans())
def test_random_ids_give_what_decoding_the_whole_gives(byte_codec: TextCodec, seed: int, skip: bool) -> None:
    rng = random.Random(seed)
    # Half of the vocabulary's first tokens are parts of characters: invalid sequences are common here.
    ids = [rng.randrange(rng.choice([300, 4096])) for _ in range(rng.randint(0, 60))]
    pieces = pieces_of(byte_codec, ids, skip)
    assert "".join(pieces) == byte_codec.decode(ids, skip)


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_complete_is_held_back(byte_codec: TextCodec, text: str) -> None:
    ids = byte_codec.encode(text, False)
    detokenizer = new_detokenizer(byte_codec, True)
    shown = b""
    raw = b""
    for token in ids:
        raw += byte_codec.token_bytes(token)
        shown += detokenizer.push(token).encode()
        open_bytes = raw[len(shown) :]
        assert raw.startswith(shown)
        with pytest.raises(UnicodeDecodeError, match="unexpected end of data") if open_bytes else _nothing():
            open_bytes.decode()
    assert shown.decode() + detokenizer.flush() == text


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *args: object) -> None: ...


def test_an_open_character_ends_as_a_replacement(byte_codec: TextCodec) -> None:
    first = next(i for i in range(300) if byte_codec.token_bytes(i) == b"\xe6")
    assert pieces_of(byte_codec, [first], True) == ["", "\ufffd"]


def test_special_tokens_are_skipped_or_shown(byte_codec: TextCodec) -> None:
    ids = [*byte_codec.encode("hi", False), 3]
    assert "".join(pieces_of(byte_codec, ids, True)) == "hi"
    assert "".join(pieces_of(byte_codec, ids, False)) == "hi<|im_end|>"
    tool = byte_codec.encode("<tool_call>", False)
    assert len(tool) == 1
    assert "".join(pieces_of(byte_codec, tool, True)) == "<tool_call>"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9))
def test_metaspace_with_byte_fallback(metaspace_codec: TextCodec, seed: int) -> None:
    rng = random.Random(seed)
    words = [rng.choice(["hello", "world", "日", "é", "👋", "abc", "caching"]) for _ in range(rng.randint(1, 8))]
    ids = metaspace_codec.encode(" ".join(words), False)
    assert "".join(pieces_of(metaspace_codec, ids, True)) == metaspace_codec.decode(ids, True)


def test_a_broken_file_is_one_sentence(tmp_path: Path) -> None:
    from core.errors import QuireError

    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(QuireError, match="cannot read"):
        TextCodec(tmp_path)
