"""Detokenization: the pieces are the whole, no character is split, and none that is complete is held back."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from core.detokenizer import new_detokenizer
from core.errors import QuireError
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


BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁hello", "▁world", "a", "b", "c", "ing", "é", "日", ".", "▁▁", "▁x▁y"]
REPLACE, FALLBACK, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
# How checkpoints' decoders look; "bytes" kinds have byte fallback.
DECODERS: dict[str, Any] = {
    "llama bytes": decoders.Sequence([REPLACE, FALLBACK, FUSE, decoders.Strip(" ", 1, 0)]),
    "gemma bytes": decoders.Sequence([REPLACE, FALLBACK, FUSE]),
    "metaspace": decoders.Metaspace(prepend_scheme="always"),
    "metaspace, no prefix": decoders.Metaspace(prepend_scheme="never"),
    "stripped tokens": decoders.Sequence([REPLACE, decoders.Strip(" ", 1, 0), FUSE]),
    "word piece": decoders.WordPiece(),
    "suffixes": decoders.BPEDecoder("</w>"),
    "none": None,
}


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextCodec]:
    """A codec for each decoder, over one vocabulary."""
    found = {}
    for name, decoder in DECODERS.items():
        pieces = ["<unk>", "<s>", "</s>", *BYTE_PIECES, *WORDS, "##ing", "##a", "n't", "end</w>", "x</w>"]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        if decoder is not None:
            tokenizer.decoder = decoder
        tokenizer.add_special_tokens(["<s>", "</s>"])
        tokenizer.add_tokens(["<tool call>"])
        folder = tmp_path_factory.mktemp("codec")
        tokenizer.save(str(folder / "tokenizer.json"))
        found[name] = TextCodec(folder)
    return found


@pytest.fixture(scope="module")
def metaspace_codec(codecs: dict[str, TextCodec]) -> TextCodec:
    """As SentencePiece, with byte fallback."""
    return codecs["llama bytes"]


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


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9))
def test_metaspace_with_byte_fallback(metaspace_codec: TextCodec, seed: int) -> None:
    rng = random.Random(seed)
    words = [rng.choice(["hello", "world", "日", "é", "👋", "abc", "caching"]) for _ in range(rng.randint(1, 8))]
    ids = metaspace_codec.encode(" ".join(words), False)
    assert "".join(pieces_of(metaspace_codec, ids, True)) == metaspace_codec.decode(ids, True)


def shown_too_early(codec: TextCodec, ids: list[int]) -> bool:
    """Whether some run of byte tokens completes a character before its first wrong byte.

    The library then takes the character back, which nobody can who has shown it.
    """
    run = b""
    for token in [*ids, -1]:
        piece = codec.token_bytes.piece(token) if token >= 0 else ""
        if isinstance(piece, bytes):
            run += piece
            continue
        if piece is None:
            continue
        try:
            run.decode()
        except UnicodeDecodeError as error:
            if error.start:
                return True
        run = b""
    return False


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.booleans())
def test_every_decoder_gives_what_decoding_the_whole_gives(
    codecs: dict[str, TextCodec], name: str, seed: int, skip: bool
) -> None:
    codec = codecs[name]
    rng = random.Random(seed)
    ids: list[int] = []
    for _ in range(rng.randint(0, 25)):
        kind = rng.random()
        if kind < 0.2:
            ids += [3 + byte for byte in rng.choice(["é", "日", "👋", " "]).encode()]
        elif kind < 0.3:
            ids.append(rng.randrange(3, 259))  # some byte
        else:
            ids.append(rng.choice([0, 1, 2, codec.num_ids + 5, *range(259, codec.num_ids)]))
    if skip:
        ids = [token for token in ids if token not in (1, 2)] if rng.random() < 0.5 else ids
    kept = [token for token in ids if not (skip and token in codec.special_ids)]
    if "bytes" in name and shown_too_early(codec, kept):
        return
    assert "".join(pieces_of(codec, ids, skip)) == codec.decode(ids, skip)


@pytest.mark.parametrize("name", [name for name in DECODERS if "bytes" in name])
def test_characters_of_bytes_are_shown_when_complete(codecs: dict[str, TextCodec], name: str) -> None:
    codec = codecs[name]
    ids = [3 + byte for byte in "é日👋".encode()]
    assert pieces_of(codec, ids, True) == ["", "é", "", "", "日", "", "", "", "👋", ""]
    # A wrong byte spoils the rest of its run, not what was shown, and not what follows the run.
    word = codec.encode("hello", False)
    assert (
        "".join(pieces_of(codec, [*ids[:2], 3 + 0xFF, *ids[2:5], 260, *ids[5:]], True))
        == "é\ufffd" + 3 * ("\ufffd") + " hello👋"
    )
    assert word


def test_cost_does_not_grow_with_the_sequence(codecs: dict[str, TextCodec], byte_codec: TextCodec) -> None:
    def seconds(codec: TextCodec, ids: list[int]) -> float:
        detokenizer = new_detokenizer(codec, True)
        began = time.process_time()
        for token in ids:
            detokenizer.push(token)
        return time.process_time() - began

    for codec in [*codecs.values(), byte_codec]:
        for token in (3 + 0x80, 260):  # a wrong byte for ever, and a word
            short = min(seconds(codec, [token] * 500) for _ in range(3))
            long = min(seconds(codec, [token] * 5000) for _ in range(3))
            assert long < 40 * short + 0.01  # a quadratic one: a hundred times


@pytest.mark.parametrize("sequence", [["word"], ["word", "strip"]])
def test_byte_level_inside_a_chain(tmp_path: Path, sequence: list[str]) -> None:
    """Byte-level with further steps is decoded by windows; whole characters still come at once."""
    tokenizer = tokenizers.Tokenizer.from_file(str(BUILTIN["tiny-chat"] / "tokenizer.json"))
    steps = [decoders.ByteLevel(), decoders.Strip("~", 1, 0)][: len(sequence)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path)
    assert codec.token_bytes.byte_level == (len(sequence) == 1)
    for text in TEXTS:
        ids = codec.encode(text, False)
        detokenizer = new_detokenizer(codec, True)
        shown = ""
        for i, token in enumerate(ids):
            shown += detokenizer.push(token)
            assert shown == codec.decode(ids[: i + 1], True).rstrip("\ufffd")
        assert shown + detokenizer.flush() == text


def test_a_lone_surrogate_is_refused(byte_codec: TextCodec) -> None:
    with pytest.raises(QuireError, match="lone surrogate") as caught:
        byte_codec.encode("a\ud800", False)
    assert caught.value.code == "invalid_value"


@pytest.mark.parametrize("text", TEXTS)
def test_the_fewest_tokens_are_no_more_than_there_are(byte_codec: TextCodec, text: str) -> None:
    for times in (1, 50):
        assert 0 <= byte_codec.fewest_tokens(text * times) <= len(byte_codec.encode(text * times, False))
    assert byte_codec.fewest_tokens("a" * 10**6) > 10**4


def test_a_broken_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(QuireError, match="cannot read"):
        TextCodec(tmp_path)
