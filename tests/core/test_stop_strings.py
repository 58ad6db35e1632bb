"""Stop strings across token borders, against a search in the whole text."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from core.stop_strings import StopStrings

letters = st.text("ab.", max_size=30)
stops = st.lists(st.text("ab.", min_size=1, max_size=4), max_size=4)


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    return [*pieces, text[at:]]


def naive(pieces: list[str], wanted: list[str], include: bool) -> tuple[str, str | None]:
    """Append piece by piece; at the first piece with a hit, cut at the stop string that is complete first."""
    text = ""
    for piece in pieces:
        text += piece
        hits = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in wanted if stop in text]
        if hits:
            end, at, stop = min(hits)
            return text[: end if include else at], stop
    return text, None


@given(letters, stops, st.lists(st.integers(0, 5), max_size=8), st.booleans())
def test_any_cutting_gives_the_naive_answer(text: str, wanted: list[str], sizes: list[int], include: bool) -> None:
    pieces = cut(text, sizes)
    scanner = StopStrings(wanted, include)
    shown = ""
    for piece in pieces:
        shown += scanner.push(piece)
        if scanner.hit is None:
            assert not any(stop in shown for stop in wanted)
    if scanner.hit is None:
        shown += scanner.flush()
    assert (shown, scanner.hit) == naive(pieces, wanted, include)


@given(letters, stops)
def test_only_what_could_become_a_stop_is_held(text: str, wanted: list[str]) -> None:
    scanner = StopStrings(wanted)
    shown = scanner.push(text)
    if scanner.hit is None:
        held = text[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in wanted)


@given(letters, stops, st.lists(st.integers(0, 5), max_size=8))
def test_what_could_become_a_stop_is_held_and_no_more(text: str, wanted: list[str], sizes: list[int]) -> None:
    scanner = StopStrings(wanted)
    seen = shown = ""
    for piece in cut(text, sizes):
        seen += piece
        shown += scanner.push(piece)
        if scanner.hit is not None:
            return
        open_ends = [len(seen) - i for i in range(len(seen)) if any(stop.startswith(seen[i:]) for stop in wanted)]
        assert len(seen) - len(shown) == max(open_ends, default=0)


def test_the_worst_stop_strings_cost_little() -> None:
    # Every position of the text is a beginning of all 64; each mismatch comes as late as it can.
    wanted = ["a" * 511 + "b" + "a" * 511 + chr(0x100 + i) for i in range(64)]
    scanner = StopStrings(wanted)
    began = time.process_time()
    shown = "".join(scanner.push("aaaa") for _ in range(1000))
    assert time.process_time() - began < 2.0  # 0.1 s here
    assert len(shown) == 4000 - 511
    assert shown + scanner.flush() == "a" * 4000


def test_nothing_is_shown_after_a_hit() -> None:
    scanner = StopStrings(["END"])
    assert scanner.push("one EN") == "one "
    assert scanner.push("D two") == ""
    assert scanner.hit == "END"
    assert scanner.push("three") == ""
    assert scanner.flush() == ""
