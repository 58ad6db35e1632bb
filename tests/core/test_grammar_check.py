"""core.grammar_check, and how the tokenizer process waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from core import grammar_check, tokenizer
from core.errors import QuireError
from core.grammar_check import GrammarCheck
from core.messages import Generate, Rejected, Started, TextPrompt
from core.model_info import resolve
from core.text_codec import TextCodec
from core.tokenizer import Requests, TokenizerProcess
from quire import SamplingParams, StructuredOutputs

MODEL = resolve("tiny-chat")
CODEC = TextCodec(Path(MODEL.path))


def test_what_was_accepted_is_known_and_forgotten_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "MAX_KNOWN", 3)
    check = GrammarCheck(MODEL, CODEC)
    wanted = [StructuredOutputs(regex=f"a{i}") for i in range(5)]
    for one in wanted:
        assert not check.known(one)
        check.check(one)
        assert check.known(one)
    assert [check.known(one) for one in wanted] == [False, False, True, True, True]
    with pytest.raises(QuireError):
        check.check(StructuredOutputs(regex="("))
    assert not check.known(StructuredOutputs(regex="("))


class Line:
    """A Channel that only remembers."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, *frame: Any) -> None:
        self.sent += frame[-1]


@pytest.fixture
def process() -> Iterator[TokenizerProcess]:
    made = TokenizerProcess(cast(Any, None), Requests(MODEL, CODEC, None), cast(Any, Line()), cast(Any, Line()))
    yield made
    made.encoders.shutdown()
    made.checker.shutdown()


def told(process: TokenizerProcess) -> list[Any]:
    return cast(Line, process.apis).sent


def generate(request_id: str, regex: str | None) -> Generate:
    wanted = None if regex is None else StructuredOutputs(regex=regex)
    return Generate(request_id, MODEL.engine, TextPrompt("x"), SamplingParams(seed=1, structured_outputs=wanted))


def test_a_check_that_does_not_end(process: TokenizerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request is refused, one that waits behind it may come again, and nobody else notices."""
    entered, leave = threading.Event(), threading.Event()

    def check(wanted: StructuredOutputs) -> None:
        entered.set()
        leave.wait(20)

    monkeypatch.setattr(tokenizer, "CHECK_S", 0.05)
    monkeypatch.setattr(process.requests.grammars, "check", check)
    try:
        process.generate("api-0", generate("slow", "a"))
        assert entered.wait(10)
        process.generate("api-0", generate("behind", "b"))
        process.generate("api-0", generate("gone", "c"))
        process.abort("gone")
        process.generate("api-0", generate("free", None))
        process.give_up_checks()
        assert [type(message) for message in told(process)] == [Started]
        time.sleep(0.06)
        process.give_up_checks()
    finally:
        leave.set()
    refused = {message.request_id: message for message in told(process)[1:]}
    assert list(refused) == ["slow", "behind"]
    assert all(isinstance(message, Rejected) for message in refused.values())
    assert (refused["slow"].code, refused["behind"].code) == ("invalid_grammar", "queue_full")
    assert refused["behind"].retry_after_s
    assert not process.aside
    assert not process.checks


def test_a_check_that_ends_late_changes_nothing(process: TokenizerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "CHECK_S", 0.0)
    leave = threading.Event()
    monkeypatch.setattr(process.requests.grammars, "check", lambda wanted: leave.wait(20))
    process.generate("api-0", generate("slow", "a"))
    (_, _, _, future) = process.checks[0]
    while not future.running():
        time.sleep(0.001)
    process.give_up_checks()
    leave.set()
    future.result(10)
    while not process.done:
        time.sleep(0.001)
    process.done.popleft()()
    assert [type(message) for message in told(process)] == [Rejected]
    assert cast(Line, process.scheduler).sent == []
