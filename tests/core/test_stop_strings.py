"""Stop strings across token borders, against a search in the whole text."""

from __future__ import annotations

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


def test_nothing_is_shown_after_a_hit() -> None:
    scanner = StopStrings(["END"])
    assert scanner.push("one EN") == "one "
    assert scanner.push("D two") == ""
    assert scanner.hit == "END"
    assert scanner.push("three") == ""
    assert scanner.flush() == ""
