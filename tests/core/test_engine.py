"""core.engine: what is sent to whom; the loop itself is tested with real processes in tests/e2e."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import engine as module
from core.admission import Bounds
from core.engine import Engine, Tokenizers
from core.messages import (
    BatchResult,
    Failed,
    KVSpec,
    QueueState,
    Rejected,
    RowResult,
    SequenceOutput,
    StepOutput,
    Submit,
    TokenSegment,
)
from core.scheduler import Limits, Scheduler
from quire import SamplingParams

BOUNDS = Bounds(max_queued_requests=4, max_queued_tokens=100, max_concurrent_requests=6)


class Sent:
    """A Server that only remembers."""

    def __init__(self) -> None:
        self.frames: list[tuple[str, list[Any]]] = []

    def send(self, peer: str, messages: list[Any]) -> None:
        self.frames.append((peer, messages))


class NothingLeft:
    """A Scheduler whose requests have all ended."""

    def has(self, request_id: str) -> bool:
        return False


def test_two_steps_at_once_of_which_both_end_a_choice() -> None:
    """By the time that the first step is published, the scheduler knows that the second one ended the request."""
    sent = Sent()
    tokenizers = Tokenizers(cast(Any, sent), "engine")
    tokenizers.owner["r"] = "tokenizer-0"
    engine = Engine(cast(Any, None), tokenizers, cast(Any, None), BOUNDS)
    engine.scheduler = cast(Any, NothingLeft())
    steps: list[Any] = [(step, [SequenceOutput("r", step, 5, [7], finish_reason="length")], {}) for step in range(2)]
    engine.publish(steps)
    assert [(peer, frame[0].step, frame[0].outputs[0].choice) for peer, frame in sent.frames] == [
        ("tokenizer-0", 0, 0),
        ("tokenizer-0", 1, 1),
    ]
    assert tokenizers.owner == {}


class Door:
    """An engine with two rows and no workers, and what its only tokenizer is told."""

    def __init__(self) -> None:
        self.sent = Sent()
        tokenizers = Tokenizers(cast(Any, self.sent), "engine")
        self.engine = Engine(cast(Any, None), tokenizers, cast(Any, None), BOUNDS)
        self.scheduler = Scheduler(Limits(2, 64, 60), [KVSpec(1, 1)], [100], 4, "r", True)
        self.engine.scheduler = self.scheduler

    def ask(self, request_id: str, tenant: str = "", tokens: int = 5, **more: Any) -> None:
        sampling = SamplingParams(max_tokens=5)
        submit = Submit(request_id, "engine", [TokenSegment([1] * tokens)], sampling, tenant=tenant, **more)
        self.engine.admit("tokenizer-0", submit)

    def told(self) -> list[Any]:
        """What was sent since the last call."""
        frames, self.sent.frames = self.sent.frames, []
        return [message for _, frame in frames for message in frame]


def test_the_exact_bounds() -> None:
    door = Door()
    for name in ("r0", "r1"):
        door.ask(name)
    assert door.scheduler.schedule() is not None
    for number in range(2, 9):
        door.ask(f"r{number}")
    refusals = door.told()
    assert [message.request_id for message in refusals] == ["r6", "r7", "r8"]
    assert all(isinstance(message, Rejected) and message.code == "queue_full" for message in refusals)
    assert "--max-concurrent-requests is 6" in refusals[0].message
    assert 1 <= refusals[0].retry_after_s <= 60
    assert set(door.engine.tokenizers.owner) == set(door.scheduler.requests) == {f"r{number}" for number in range(6)}
    assert door.engine.meter.refused == {"max_concurrent_requests": 3}


def test_the_newest_of_the_longest_gives_way() -> None:
    door = Door()
    for number in range(4):
        door.ask(f"noisy{number}", "noisy")
    door.ask("quiet0", "quiet")
    door.ask("quiet1", "quiet")
    door.ask("quiet2", "quiet")
    assert [message.request_id for message in door.told()] == ["noisy3", "noisy2", "quiet2"]
    assert set(door.scheduler.requests) == {"noisy0", "noisy1", "quiet0", "quiet1"}
    assert door.engine.meter.refused == {"max_queued_requests": 3}


def test_a_long_prompt_makes_several_give_way_or_none() -> None:
    door = Door()
    for number in range(3):
        door.ask(f"noisy{number}", "noisy", 30)
    door.ask("quiet", "quiet", 30)
    assert [message.request_id for message in door.told()] == ["noisy2"]
    door.ask("other", "other", 55)  # more than any of them has
    assert [message.request_id for message in door.told()] == ["other"]  # noisy1 alone would not make room
    door.ask("third", "third", 20)
    assert [message.request_id for message in door.told()] == ["noisy1"]
    assert door.scheduler.queued_tokens == 80


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9))
def test_every_request_has_exactly_one_ending(seed: int) -> None:
    """Whatever comes, is refused, gives way, expires, runs or is aborted: nobody ends twice, nobody is forgotten."""
    rng = random.Random(seed)
    door = Door()
    clock = SimpleNamespace(now=0.0)
    endings: Counter[str] = Counter()
    aborted: set[str] = set()

    def step() -> None:
        batch = door.scheduler.schedule()
        if batch is not None:
            results = [RowResult(item.row, [7]) for item in batch.scheduled if item.sample]
            door.engine.publish([(batch.step, door.scheduler.update(BatchResult("", batch.step, results)), {})])
        door.engine.expire()
        for message in door.told():
            if isinstance(message, StepOutput):
                endings.update(output.request_id for output in message.outputs if output.finish_reason is not None)
            elif isinstance(message, Rejected | Failed):
                endings[message.request_id] += 1

    with patch.object(module, "time", SimpleNamespace(monotonic=lambda: clock.now)):
        for number in range(60):
            deadline_s = clock.now + rng.randint(1, 12) if rng.random() < 0.3 else None
            tokens, priority = rng.randint(1, 50), rng.randint(0, 1)
            more = {"user": rng.choice("xy"), "deadline_s": deadline_s, "priority": priority}
            door.ask(f"r{number}", rng.choice("aab"), tokens, **more)
            live = list(door.engine.tokenizers.owner)
            if live and rng.random() < 0.1:
                gone = rng.choice(live)
                aborted.add(gone)
                door.engine.abort(gone)
            clock.now += rng.random()
            for _ in range(rng.randint(0, 3)):
                step()
        for _ in range(2000):
            step()
    assert not door.scheduler.requests
    assert not door.engine.tokenizers.owner
    assert max(endings.values()) == 1
    assert {f"r{number}" for number in range(60)} == set(endings) | aborted
    assert not set(endings) & aborted
    assert (door.scheduler.num_waiting, door.scheduler.queued_tokens) == (0, 0)
    assert door.scheduler.counters.aborted == len(aborted)


def test_a_resumed_request_is_let_in() -> None:
    door = Door()
    for number in range(7):
        door.ask(f"r{number}", epoch=1)
    assert door.told() == []
    assert len(door.scheduler.requests) == 7


def test_a_deadline_that_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    door = Door()
    door.ask("runs", deadline_s=100.0)
    assert door.scheduler.schedule() is not None
    door.ask("waits", deadline_s=90.0)
    door.ask("patient")
    door.engine.expire()
    assert door.told() == []
    now = 100.0
    door.engine.expire()
    door.engine.expire()
    assert [(type(ending), ending.request_id, ending.code) for ending in door.told()] == [
        (Failed, "waits", "deadline_exceeded"),
        (Failed, "runs", "deadline_exceeded"),
    ]
    assert list(door.scheduler.requests) == list(door.engine.tokenizers.owner) == ["patient"]
    assert door.scheduler.running == []
    assert door.scheduler.groups.pools[0].num_free == 100
    assert door.engine.meter.expired == {"waiting": 1, "running": 1}


def test_how_full_the_house_is_is_told_when_it_is_news(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    door = Door()
    door.engine.tokenizers.greet("tokenizer-0")
    door.engine.tokenizers.greet("tokenizer-0")
    assert door.told() == [QueueState(0, 0, 0)]
    door.ask("r0")
    door.engine.tell_state()
    assert door.told() == []  # not half full
    door.ask("r1")
    door.engine.tell_state()
    assert door.told() == []  # a moment ago
    now = 50.06
    door.engine.tell_state()
    now = 50.12
    door.engine.tell_state()
    assert door.told() == [QueueState(2, 10, 2, 1)]
    door.engine.abort("r1")
    now = 50.18
    door.engine.tell_state()
    assert door.told() == [QueueState(0, 0, 0)]
