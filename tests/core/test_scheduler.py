"""The scheduler against a simulated worker that keeps a real memory.

Every KV slot of the simulated worker holds the whole prefix that its content depends on. When a token is "computed",
every position that it attends to must hold exactly the right prefix; the token that is then drawn is a function of the
prefix, the request and the choice. So a block that is shared wrongly, freed too early, copied too late or cached under
the wrong hash is found, and outputs must equal those of an undisturbed run whatever was aborted, preempted or reset.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.messages import (
    Batch,
    BatchResult,
    KVSpec,
    NewSequence,
    RowResult,
    SequenceOutput,
    Submit,
    TokenLogprobs,
    TokenSegment,
)
from core.request import State
from core.scheduler import Limits, Scheduler
from quire import SamplingParams

EOS = 9
Prefix = tuple[int, ...]


def draw(prefix: Prefix, prompt_length: int, seed: int, choice: int) -> int:
    """The next token: depends on everything before it, the request's seed and the choice."""
    key = f"{prefix} {prompt_length} {seed} {choice}".encode()
    return hashlib.sha256(key).digest()[0] % 10


def expected(submit: Submit, choice: int, longest: int) -> list[int]:
    """What an undisturbed run gives."""
    prompt = submit.segments[0].ids
    tokens = list(prompt)
    most = min(submit.sampling.max_tokens or longest, longest - len(prompt))
    while len(tokens) - len(prompt) < most:
        token = draw(tuple(tokens), len(prompt), submit.sampling.seed or 0, choice)
        tokens.append(token)
        if token in submit.eos_ids:
            break
    return tokens[len(prompt) :]


class SimulatedWorker:
    """Executes Batches in order on a memory of prefixes, and checks each access."""

    def __init__(self, specs: list[KVSpec], num_blocks: list[int], block_size: int, num_rows: int) -> None:
        self.specs = specs
        self.block_size = block_size
        self.memory: list[dict[int, Prefix]] = [{} for _ in specs]
        self.sequences: dict[int, NewSequence] = {}
        self.tokens: dict[int, list[int]] = {}
        self.tables: list[dict[int, dict[int, int]]] = [{} for _ in specs]
        self.num_blocks = num_blocks

    def run(self, batch: Batch) -> BatchResult:
        for row in batch.released:
            self.sequences.pop(row, None)
        for new in batch.new:
            self.sequences[new.row] = new
            self.tokens[new.row] = new.prompt_ids + new.output_ids
            for tables in self.tables:
                tables[new.row] = {}
        for diff in batch.blocks:
            table = self.tables[diff.group].setdefault(diff.row, {})
            for i, block in enumerate(diff.block_ids):
                assert block < self.num_blocks[diff.group]
                table[diff.start + i] = block
        for copy in batch.copies:
            memory = self.memory[copy.group]
            for offset in range(self.block_size):
                if (prefix := memory.get(copy.src * self.block_size + offset)) is not None:
                    memory[copy.dst * self.block_size + offset] = prefix
        rows = [item.row for item in batch.scheduled]
        assert len(rows) == len(set(rows))
        sizes = [item.num_tokens for item in batch.scheduled]
        assert sizes == sorted(sizes, key=lambda n: n > 1), "rows of one token come first"
        written: dict[tuple[int, int], int] = {}
        for item in batch.scheduled:
            tokens = self.tokens[item.row]
            assert item.start + item.num_tokens <= len(tokens), "computes a token that nobody has drawn"
            for position in range(item.start, item.start + item.num_tokens):
                for group in range(len(self.specs)):
                    slot = self.slot(group, item.row, position)
                    self.memory[group][slot] = tuple(tokens[: position + 1])
                    other = written.setdefault((group, slot), item.row)
                    assert other == item.row, "two sequences write one slot in a step"
        results = []
        for item in batch.scheduled:
            tokens = self.tokens[item.row]
            for position in range(item.start, item.start + item.num_tokens):
                self.check(item.row, position, tokens)
            end = item.start + item.num_tokens
            new = self.sequences[item.row]
            ids = []
            if item.sample:
                assert end == len(tokens)
                ids = [draw(tuple(tokens), len(new.prompt_ids), new.sampling.seed or 0, new.choice)]
                tokens.append(ids[0])
            asked = range(item.start + 1, min(end, len(new.prompt_ids) - 1) + 1) if item.prompt_logprobs else []
            marks = [TokenLogprobs(-float(position), tokens[position]) for position in asked]
            results.append(RowResult(item.row, ids, [], marks))
        return BatchResult("", batch.step, results)

    def slot(self, group: int, row: int, position: int) -> int:
        block = self.tables[group][row][position // self.block_size]
        assert block >= 0
        return block * self.block_size + position % self.block_size

    def check(self, row: int, position: int, tokens: list[int]) -> None:
        for group, spec in enumerate(self.specs):
            first = 0 if spec.window is None else max(0, position - spec.window + 1)
            for seen in range(first, position + 1):
                assert self.memory[group].get(self.slot(group, row, seen)) == tuple(tokens[: seen + 1])


class Harness:
    """A scheduler, its simulated worker and at most two steps in flight."""

    def __init__(self, specs: list[KVSpec], num_blocks: int, block_size: int, rows: int, tokens: int, caching: bool):
        self.limits = Limits(rows, tokens, max_model_len=60, ideal_step_tokens=max(4, tokens // 2))
        counts = [num_blocks] * len(specs)
        self.scheduler = Scheduler(self.limits, specs, counts, block_size, "rev", caching)
        self.shape = (specs, counts, block_size, rows)
        self.worker = SimulatedWorker(*self.shape)
        self.in_flight: deque[BatchResult] = deque()
        self.submits: dict[str, Submit] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        self.endings: dict[tuple[str, int], int] = {}
        self.silenced: set[tuple[str, int]] = set()

    def add(self, submit: Submit) -> None:
        if self.scheduler.fits(submit) is None:
            self.submits[submit.request_id] = submit
            self.scheduler.add(submit)

    def send(self) -> bool:
        if len(self.in_flight) == 2 or (batch := self.scheduler.schedule()) is None:
            return False
        assert sum(item.num_tokens for item in batch.scheduled) <= self.limits.max_step_tokens
        self.in_flight.append(self.worker.run(batch))
        return True

    def answer(self) -> bool:
        if not self.in_flight:
            return False
        for output in self.scheduler.update(self.in_flight.popleft()):
            self.take(output)
        return True

    def take(self, output: SequenceOutput) -> None:
        key = (output.request_id, output.choice)
        assert key not in self.silenced, "news of a sequence that was ended from outside"
        assert key not in self.endings, "news after the ending"
        tokens = self.got.setdefault(key, [])
        assert output.first == len(tokens)
        tokens += output.token_ids
        self.prompt_logprobs.setdefault(output.request_id, []).extend(output.prompt_logprobs)
        if output.finish_reason is not None:
            self.endings[key] = 1

    def silence(self, request_id: str, choices: Any) -> None:
        self.silenced |= {(request_id, c) for c in choices if (request_id, c) not in self.endings}

    def reset(self) -> None:
        self.in_flight.clear()
        self.worker = SimulatedWorker(*self.shape)
        self.scheduler.reset_workers()

    def check_counts(self) -> None:
        for group, pool in enumerate(self.scheduler.groups.pools):
            held = [0] * pool.num_blocks
            for sequence in self.scheduler.running:
                for block in sequence.tables[group].ids[sequence.tables[group].first :]:
                    held[block] += 1
            assert held == pool.refs
            assert pool.num_cached == sum(1 for block in pool.index.values() if not pool.refs[block])
            assert {block for block, refs in enumerate(pool.refs) if refs == 0} == set(pool.free)

    def finish(self) -> None:
        for _ in range(5000):
            if not (self.send() or self.answer()):
                break
        self.check_counts()
        assert sum(self.scheduler.waiting_by().values()) == 0
        assert not self.scheduler.requests
        assert not self.scheduler.running
        assert self.scheduler.num_waiting == 0
        for request_id, submit in self.submits.items():
            for choice in range(submit.sampling.n):
                key = (request_id, choice)
                want = expected(submit, choice, self.limits.max_model_len)
                if key in self.silenced:
                    assert self.got.get(key, []) == want[: len(self.got.get(key, []))]
                else:
                    assert self.endings.get(key) == 1, f"{key} never ended"
                    assert self.got[key] == want
            if submit.sampling.prompt_logprobs is not None and not any(k[0] == request_id for k in self.silenced):
                ids = submit.segments[0].ids
                assert [mark.rank for mark in self.prompt_logprobs.get(request_id, [])] == ids[1:]
        assert all(pool.num_free == pool.num_blocks for pool in self.scheduler.groups.pools)


SPECS = [
    [KVSpec(1, 1)],
    [KVSpec(1, 1, window=6)],
    [KVSpec(1, 1), KVSpec(1, 1, window=5)],
    [KVSpec(1, 1, window=9), KVSpec(1, 1), KVSpec(1, 1, window=3)],
]


def submit(number: int, rng: random.Random) -> Submit:
    # Few distinct tokens and shared beginnings: the prefix cache is hit often.
    prompt = [1, 2, 3, 4, 5, 6, 7, 8] * 3
    length = rng.randint(1, 24)
    ids = prompt[:length] if rng.random() < 0.6 else [rng.randint(0, 3) for _ in range(length)]
    sampling = SamplingParams(
        n=rng.choice([1, 1, 1, 2, 4]),
        seed=rng.randint(0, 3),
        max_tokens=rng.randint(1, 20),
        prompt_logprobs=0 if rng.random() < 0.2 else None,
    )
    return Submit(
        f"r{number}",
        "",
        [TokenSegment(ids)],
        sampling,
        [EOS] if rng.random() < 0.7 else [],
        rng.choice([0, 0, 1]),
        tenant=rng.choice("ab"),
        user=rng.choice("xy"),
    )


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**9), st.integers(0, len(SPECS) - 1), st.booleans())
def test_any_order_of_events(seed: int, specs: int, caching: bool) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4])
    harness = Harness(
        SPECS[specs],
        num_blocks=rng.randint(8, 40) * 4 // block_size,
        block_size=block_size,
        rows=rng.randint(1, 6),
        tokens=rng.choice([2, 5, 16, 64]),
        caching=caching,
    )
    number = 0
    for _ in range(rng.randint(10, 120)):
        event = rng.random()
        live = list(harness.scheduler.requests)
        if event < 0.2:
            harness.add(submit(number, rng))
            number += 1
        elif event < 0.24 and live:
            request_id = rng.choice(live)
            harness.silence(request_id, range(harness.submits[request_id].sampling.n))
            assert harness.scheduler.abort(request_id)
        elif event < 0.29 and live:
            request_id = rng.choice(live)
            choice = rng.randrange(harness.submits[request_id].sampling.n)
            harness.silence(request_id, [choice])
            harness.scheduler.stop(request_id, choice)
        elif event < 0.31:
            harness.reset()
        elif event < 0.65:
            harness.send()
        else:
            harness.answer()
        harness.check_counts()
    harness.finish()


def run_all(harness: Harness, submits: list[Submit]) -> None:
    for item in submits:
        harness.add(item)
    harness.finish()


def test_preemption_happens_and_changes_nothing() -> None:
    harness = Harness(SPECS[0], num_blocks=12, block_size=2, rows=4, tokens=64, caching=True)
    run_all(
        harness,
        [Submit(f"r{i}", "", [TokenSegment([i, 1, 2])], SamplingParams(seed=i, max_tokens=15)) for i in range(4)],
    )
    assert harness.scheduler.counters.preemptions > 0
    assert harness.scheduler.counters.recomputed_tokens > 0
    assert len(harness.endings) == 4


def test_prefix_cache_gives_whole_blocks_but_never_the_last_token() -> None:
    harness = Harness(SPECS[0], num_blocks=40, block_size=4, rows=4, tokens=64, caching=True)
    ids = list(range(8)) + list(range(8))
    one = Submit("a", "", [TokenSegment(ids)], SamplingParams(seed=1, max_tokens=2))
    run_all(harness, [one])
    run_all(harness, [Submit("b", "", [TokenSegment(ids)], SamplingParams(seed=1, max_tokens=2))])
    assert harness.scheduler.counters.cached_tokens == 12
    other = Submit("c", "", [TokenSegment(ids)], SamplingParams(seed=1, max_tokens=2), cache_keys=["salt"])
    run_all(harness, [other])
    assert harness.scheduler.counters.cached_tokens == 12


def test_a_step_ahead_wastes_one_slot_after_the_end() -> None:
    harness = Harness(SPECS[0], num_blocks=40, block_size=4, rows=4, tokens=64, caching=True)
    for seed in range(200):
        item = Submit(f"r{seed}", "", [TokenSegment([1, 2, 3])], SamplingParams(seed=seed, max_tokens=20), [EOS])
        if 2 <= len(expected(item, 0, 60)) < 20:
            break
    harness.add(item)
    steps = 0
    while harness.scheduler.requests:
        while harness.send():
            steps += 1
        harness.answer()
    assert steps == len(expected(item, 0, 60)) + 1


def test_resume_continues_where_it_was() -> None:
    item = Submit("r", "", [TokenSegment([1, 2, 3])], SamplingParams(seed=5, max_tokens=12))
    want = expected(item, 0, 60)
    from core.messages import ChoiceProgress

    harness = Harness(SPECS[0], num_blocks=40, block_size=4, rows=4, tokens=64, caching=True)
    resumed = Submit("r", "", item.segments, item.sampling, resume=[ChoiceProgress(0, want[:5])])
    harness.scheduler.add(resumed)
    harness.got[("r", 0)] = want[:5]
    while harness.send() or harness.answer():
        pass
    assert harness.got[("r", 0)] == want


def test_never_fits() -> None:
    harness = Harness(SPECS[0], num_blocks=5, block_size=4, rows=4, tokens=64, caching=True)
    too_long = Submit("r", "", [TokenSegment([1] * 60)], SamplingParams(max_tokens=1))
    assert "60 tokens" in (harness.scheduler.fits(too_long) or "")
    too_big = Submit("r", "", [TokenSegment([1] * 20)], SamplingParams(max_tokens=20))
    assert "KV cache" in (harness.scheduler.fits(too_big) or "")


def test_priority_goes_first() -> None:
    harness = Harness(SPECS[0], num_blocks=40, block_size=4, rows=1, tokens=64, caching=True)
    for i, priority in enumerate([1, 1, 0]):
        harness.add(Submit(f"r{i}", "", [TokenSegment([1, 2])], SamplingParams(max_tokens=3), priority=priority))
    harness.send()
    (running,) = harness.scheduler.running
    assert running.request.submit.request_id == "r2"
    assert running.state is State.RUNNING
    harness.finish()


def test_a_tenant_with_much_waiting_delays_another_by_one_turn() -> None:
    harness = Harness(SPECS[0], num_blocks=60, block_size=4, rows=2, tokens=64, caching=True)

    def ask(name: str, tenant: str) -> Submit:
        return Submit(name, "", [TokenSegment([1, 2])], SamplingParams(max_tokens=3), tenant=tenant)

    for i in range(200):
        harness.add(ask(f"noisy{i}", "noisy"))
    for _ in range(20):
        while harness.send():
            pass
        harness.answer()
    harness.add(ask("quiet", "quiet"))
    begun = len(harness.got)
    while ("quiet", 0) not in harness.got:
        while harness.send():
            pass
        harness.answer()
    assert len(harness.got) - begun <= 4  # the two that ran, one that had its turn, and this one
    harness.finish()


def test_shares_are_of_what_was_really_generated() -> None:
    """One tenant always asks for 40 tokens and mostly ends sooner, the other takes all of the 10 that it asks for."""
    harness = Harness(SPECS[0], num_blocks=200, block_size=4, rows=2, tokens=64, caching=False)
    for i in range(300):
        sampling = SamplingParams(max_tokens=40, seed=i)
        harness.add(Submit(f"sooner{i}", "", [TokenSegment([1])], sampling, [EOS], tenant="sooner"))
        sampling = SamplingParams(max_tokens=10, seed=i)
        harness.add(Submit(f"all{i}", "", [TokenSegment([1])], sampling, tenant="all"))
    while harness.scheduler.num_waiting > 300:
        while harness.send():
            pass
        harness.answer()
    tokens = {"sooner": 0, "all": 0}
    for (request_id, _), ids in harness.got.items():
        tokens[request_id.rstrip("0123456789")] += 1 + len(ids)
    assert 0.75 < tokens["sooner"] / tokens["all"] < 1.33, tokens
    harness.finish()


def test_who_gives_way_has_not_begun() -> None:
    """A resumed request whose client has heard something keeps its place, whatever waits."""
    from core.messages import ChoiceProgress

    harness = Harness(SPECS[0], num_blocks=40, block_size=4, rows=1, tokens=64, caching=True)
    scheduler = harness.scheduler
    heard = Submit("heard", "", [TokenSegment([1])], SamplingParams(n=2, max_tokens=9), tenant="a", epoch=1)
    scheduler.add(msgspec.structs.replace(heard, resume=[ChoiceProgress(0, []), ChoiceProgress(1, [5])]))
    newcomer = Submit("new", "", [TokenSegment([1])], SamplingParams(), tenant="b")
    assert scheduler.surplus(newcomer) is None
    for name in ("one", "two"):
        scheduler.add(Submit(name, "", [TokenSegment([1] * 5)], SamplingParams(max_tokens=5), tenant="a"))
    assert (scheduler.num_waiting, scheduler.queued_tokens) == (4, 10)
    assert [scheduler.has_begun(name) for name in ("heard", "one", "unknown")] == [True, False, False]
    assert scheduler.surplus(newcomer) == "two"
    assert scheduler.abort("two")
    assert scheduler.surplus(newcomer, 1) == "one"
    harness.send()
    assert scheduler.running[0].request.submit.request_id == "heard"


def test_a_choice_that_waits_while_another_runs_does_not_give_way() -> None:
    from core.messages import ChoiceProgress

    harness = Harness(SPECS[0], num_blocks=40, block_size=4, rows=1, tokens=64, caching=True)
    resumed = Submit("r", "", [TokenSegment([1])], SamplingParams(n=3, max_tokens=9), tenant="a", epoch=1)
    progress = [ChoiceProgress(choice, []) for choice in range(3)]
    harness.scheduler.add(msgspec.structs.replace(resumed, resume=progress))
    newcomer = Submit("new", "", [TokenSegment([1])], SamplingParams(), tenant="b")
    assert harness.scheduler.surplus(newcomer) == "r"
    harness.send()
    assert (len(harness.scheduler.running), harness.scheduler.num_waiting) == (1, 2)
    assert harness.scheduler.surplus(newcomer) is None


@pytest.mark.parametrize("decodes", [0, 1, 64, 512])
def test_prefill_always_advances(decodes: int) -> None:
    from core.policy import prefill_budget

    assert prefill_budget(decodes, 10_000, 160, 1024) > 0
