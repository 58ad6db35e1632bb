"""core.grammar_rows: who is constrained, what may come, and what a row's failure touches."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from core.grammar import Grammars, load_grammars
from core.grammar_rows import MAX_COMPILED, GrammarRow, GrammarRows, Mask
from core.messages import NewSequence, Scheduled
from core.model_info import resolve
from core.text_codec import TextCodec
from quire import SamplingParams, StructuredOutputs

MODEL = resolve("tiny-chat")
CODEC = TextCodec(Path(MODEL.path))
GRAMMARS = load_grammars(MODEL)
EOS = MODEL.eos_ids
# Letters of which the vocabulary has no pairs.
Q, Z = CODEC.encode("Q", False)[0], CODEC.encode("Z", False)[0]


def rows_of(grammars: Grammars = GRAMMARS) -> GrammarRows:
    return GrammarRows(MODEL.vocab_size, lambda: grammars)


def new(row: int, regex: str | None, output_ids: list[int] | None = None, **sampling: Any) -> NewSequence:
    wanted = None if regex is None else StructuredOutputs(regex=regex)
    params = SamplingParams(structured_outputs=wanted, **sampling)
    return NewSequence(row, 0, [5], output_ids or [], params, EOS)


def ids_of(mask: Mask) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def draw(rows: GrammarRows, row: int) -> tuple[GrammarRow, set[int]]:
    """The grammar of a row that draws alone, and the ids that it may draw."""
    allowed = rows.allowed([row])
    assert allowed is not None
    assert allowed.masks.shape == (1, MODEL.vocab_size // 32)
    return allowed.rows[0], ids_of(allowed.masks[0])


def test_only_constrained_rows_have_masks() -> None:
    rows = rows_of()
    rows.begin(new(3, None))
    assert rows.allowed([3]) is None
    rows.begin(new(1, "QZ"))
    rows.begin(new(2, "ZQ"))
    allowed = rows.allowed([3, 2, 1])
    assert allowed is not None
    assert [sorted(ids_of(mask)) for mask in allowed.masks] == [[Z], [Q]]
    assert list(allowed.rows) == [1, 2]  # the indices in the question
    rows.begin(new(1, None))
    rows.release([2])
    assert rows.allowed([3, 2, 1]) is None
    rows.begin(new(1, "QZ"))
    rows.clear()
    assert rows.allowed([1]) is None


def test_a_row_goes_on_by_what_it_drew() -> None:
    rows = rows_of()
    rows.begin(new(0, "QZ?"))
    scheduled = [Scheduled(0, 0, 1, True)]
    assert not rows.pending(scheduled)
    row, ids = draw(rows, 0)
    assert ids == {Q}
    assert rows.pending(scheduled)
    assert not rows.pending([Scheduled(0, 0, 1, False)])
    rows.begin(new(0, "Z"))  # the row is another's by the time that the token is known
    assert not rows.pending(scheduled)
    assert draw(rows, 0)[1] == {Z}
    assert row.take(Q) == ""
    assert ids_of(row.allowed()) == {Z, *EOS}
    assert row.take(EOS[0]) == ""
    assert ids_of(row.allowed()) == set(EOS)
    assert row.take(Q) == ""  # computed one step too many: nobody wants it


def test_replay_is_as_if_it_had_run() -> None:
    rows = rows_of()
    rows.begin(new(0, "(QZ)+", [Q, Z, Q]))
    assert draw(rows, 0)[1] == {Z}


def test_the_grammar_wins() -> None:
    rows = rows_of()
    rows.begin(new(0, "Q*", [Q, Q], min_tokens=3))
    row, ids = draw(rows, 0)
    assert Q in ids
    assert not ids & set(EOS)
    row.take(Q)
    assert set(EOS) <= ids_of(row.allowed())
    rows.begin(new(0, "[QZ]*", [Q, Q], min_tokens=3, stop_token_ids=(Q,)))
    assert draw(rows, 0)[1] == {Z}
    rows.begin(new(0, "Q*", [Q, Q], min_tokens=3, stop_token_ids=(Q,)))
    assert draw(rows, 0)[1] == {Q, *EOS}
    rows.begin(new(0, "QQ", [Q, Q], min_tokens=9, ignore_eos=True))
    assert draw(rows, 0)[1] == set(EOS)
    rows.begin(new(0, "Q*", [Q] * 99, ignore_eos=True))
    assert not draw(rows, 0)[1] & set(EOS)


def test_an_error_is_its_rows_alone() -> None:
    rows = rows_of()
    for row, (regex, output_ids) in enumerate([("(", []), ("QZ", [Z]), ("QZ", [])]):
        rows.begin(new(row, regex, output_ids))
    allowed = rows.allowed([0, 1, 2])
    assert allowed is not None
    assert [bool(row.error) for row in allowed.rows.values()] == [True, True, False]
    assert [len(ids_of(mask)) for mask in allowed.masks] == [MODEL.vocab_size, MODEL.vocab_size, 1]
    assert allowed.rows[0].take(7).startswith("structured_outputs: ")
    assert "satisfy" in allowed.rows[2].take(Z)  # an id that was not allowed: logits that are not numbers


def test_a_vocabulary_that_cannot_be_read() -> None:
    def load() -> Grammars:
        raise OSError("no such file")

    rows = GrammarRows(MODEL.vocab_size, load)
    rows.begin(new(0, "Q"))
    assert draw(rows, 0)[0].error == "no such file"


def test_a_slow_compilation_holds_up_only_its_own_draw() -> None:
    release = threading.Event()

    def load() -> Grammars:
        release.wait(10)
        return GRAMMARS

    rows = GrammarRows(MODEL.vocab_size, load)
    rows.begin(new(0, "Q"))
    rows.begin(new(1, None))
    assert rows.allowed([1]) is None
    assert not rows.pending([Scheduled(0, 0, 1, True)])
    release.set()
    assert draw(rows, 0)[1] == {Q}


def test_what_is_kept_is_bounded() -> None:
    rows = rows_of()
    for i in range(MAX_COMPILED + 5):
        rows.begin(new(0, f"Q{{{i + 1}}}"))
    assert draw(rows, 0)[1] >= {Q}
    assert len(rows._compiled) == MAX_COMPILED
