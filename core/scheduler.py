"""Scheduler: decides, step by step, which tokens of which sequences are computed. Pure: no sockets, no clock.

`schedule` makes the Batch of the next step, up to one step ahead of the answers: it knows how many tokens each sequence
will have, not which. `update` takes an answer and gives the news. Workers execute in order, so blocks and rows that are
freed here may be given away at once.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

from core import policy
from core.blocks import BlockGroups, BlockTable, root_key
from core.fair_queue import FairQueue, Place
from core.messages import (
    Batch,
    BatchResult,
    BlockCopy,
    KVSpec,
    NewSequence,
    RowBlocks,
    RowResult,
    Scheduled,
    SequenceOutput,
    Submit,
)
from core.request import Request, Sequence, State


@dataclass(frozen=True, slots=True)
class Limits:
    """What the workers can hold. ideal_step_tokens: where their GEMMs turn compute-bound; step_sizes: token counts to
    which steps are padded, ascending."""

    max_num_seqs: int
    max_step_tokens: int
    max_model_len: int
    ideal_step_tokens: int = 160
    step_sizes: tuple[int, ...] = ()


@dataclass(slots=True)
class Counters:
    """What has happened so far; plain numbers that the engine puts into its snapshot."""

    requests: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    step_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    dequeued: int = 0  # sequences that waited and have begun
    dequeued_tokens: int = 0


RUNNING, FINISHED = State.RUNNING, State.FINISHED  # looked up once: the loops below run for every row of every step

# One row of a step in flight: the sequence, its era, the step's positions [start, end), whether it samples.
Entry = tuple[Sequence, int, int, int, bool]


class Scheduler:
    """Requests in, Batches out, BatchResults in, news out."""

    def __init__(
        self,
        limits: Limits,
        specs: list[KVSpec],
        num_blocks: list[int],
        block_size: int,
        revision: str,
        caching: bool,
        first_step: int = 0,
    ) -> None:
        self.limits = limits
        self.demand = policy.Demand()
        self.groups = BlockGroups(specs, num_blocks, block_size, caching)
        self.counters = Counters()
        self.requests: dict[str, Request] = {}
        self.running: list[Sequence] = []
        self._revision = revision
        self._fresh: FairQueue[Sequence] = FairQueue()
        # Those that wait but have begun before go first: a heap by age; what no longer waits is skipped when met.
        self._begun: list[Sequence] = []
        self._num_begun = {State.WAITING: 0, State.PREEMPTED: 0}
        self._waiting_tokens = 0
        self._forks: deque[tuple[Sequence, Sequence]] = deque()  # (parent, fork), the parent's prompt is scheduled
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._released: list[int] = []
        self._steps: dict[int, dict[int, Entry]] = {}
        self._step = first_step
        self._arrivals = 0

    # ------------------------------------------------------------------------------------------ requests

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a row or for blocks."""
        return len(self._fresh) + sum(self._num_begun.values()) + len(self._forks)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of the sequences that have not begun."""
        return self._fresh.tokens

    def waiting_by(self) -> dict[str, int]:
        """`num_waiting` by what the sequences wait for. Nobody overtakes: all wait for what the first one waits for.

        rows: --max-num-seqs run already. memory: KV blocks. turn: their share of a step's tokens. preempted: blocks, a
        second time. prompt: choice 0 computes the prompt that they share.
        """
        first = self._first_begun() or self._fresh.first()
        found = {"rows": 0, "memory": 0, "turn": 0}
        if first is not None:
            wanted = self._blocks_wanted(first, self.groups.match(self._usable_keys(first)))
            enough = self.groups.can_take(wanted)
            reason = "turn" if self._free_rows and enough else "memory" if self._free_rows else "rows"
            found[reason] = len(self._fresh) + self._num_begun[State.WAITING]
        return found | {"preempted": self._num_begun[State.PREEMPTED], "prompt": len(self._forks)}

    def surplus(self, submit: Submit, excess_tokens: int = 0) -> str | None:
        """The request that should give way to a newcomer when the queue is full (`excess_tokens`: by so many tokens);
        None: the newcomer itself."""
        place = Place(submit.tenant, submit.user, submit.priority, sum(len(part.ids) for part in submit.segments))
        sequence = self._fresh.surplus(place, excess_tokens)
        if sequence is None or sequence.request.begun:  # a choice of a resumed request waits while another one runs
            return None
        return sequence.request.submit.request_id

    def has(self, request_id: str) -> bool:
        """Whether a request is under way."""
        return request_id in self.requests

    def has_begun(self, request_id: str) -> bool:
        """Whether some choice of a request under way has begun."""
        request = self.requests.get(request_id)
        return request is not None and request.begun

    def fits(self, submit: Submit) -> str | None:
        """Why a request can never run here, or None."""
        num_prompt = sum(len(segment.ids) for segment in submit.segments)
        longest = self.limits.max_model_len
        if num_prompt >= longest:
            return f"the prompt has {num_prompt} tokens; the model takes at most {longest - 1} and one to generate"
        most = min(num_prompt + (submit.sampling.max_tokens or longest), longest)
        for spec, pool in zip(self.groups.specs, self.groups.pools, strict=True):
            held = most if spec.window is None else min(most, spec.window + self.limits.max_step_tokens)
            if self.groups.blocks_for(held) + 1 > pool.num_blocks:
                capacity = (pool.num_blocks - 1) * self.groups.block_size
                return f"the request needs {held} tokens of KV cache, the cache holds {capacity}; lower max_tokens"
        return None

    def add(self, submit: Submit) -> None:
        """Queue a request that `fits`."""
        sampling = submit.sampling
        prompt_ids = [token for segment in submit.segments for token in segment.ids]
        request = Request(
            submit=submit,
            prompt_ids=prompt_ids,
            root_key=root_key([self._revision, *submit.cache_keys]),
            max_output=min(
                sampling.max_tokens or self.limits.max_model_len, self.limits.max_model_len - len(prompt_ids)
            ),
            ends=frozenset(submit.eos_ids) | frozenset(sampling.stop_token_ids),
        )
        resumed = {progress.choice: list(progress.output_ids) for progress in submit.resume}
        request.begun = bool(submit.resume) and (len(resumed) < sampling.n or any(resumed.values()))
        self._arrivals += 1
        for choice in range(sampling.n):
            output_ids = resumed.get(choice, [])
            sequence = Sequence(request, choice, output_ids, policy.order(submit.priority, self._arrivals, choice))
            request.sequences.append(sequence)
            if submit.resume and choice not in resumed:
                sequence.state = State.FINISHED  # it had ended before
                continue
            request.unfinished += 1
            if choice == 0 or submit.resume:
                self._wait(sequence, State.WAITING)
            else:
                sequence.state = State.FORKING
                request.forks.append(sequence)
        self.requests[submit.request_id] = request
        self.counters.requests += 1
        self.counters.prompt_tokens += len(prompt_ids)

    def abort(self, request_id: str) -> bool:
        """Free everything of a request at once; False when it is unknown."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        for sequence in request.sequences:
            if sequence.state is not State.FINISHED:
                self._end(sequence)
        return True

    def stop(self, request_id: str, choice: int) -> bool:
        """A text rule ended this choice: free it. True when that ended the whole request."""
        request = self.requests.get(request_id)
        if request is None or not 0 <= choice < len(request.sequences):
            return False
        if request.sequences[choice].state is not State.FINISHED:
            self._end(request.sequences[choice])
        return request_id not in self.requests

    def requests_of(self, step: int, rows: list[int]) -> list[str]:
        """The requests of a step in flight; those of `rows`, when any are named."""
        entries = self._steps.get(step, {})
        chosen = [entries[row] for row in rows if row in entries] if rows else list(entries.values())
        return list(dict.fromkeys(entry[0].request.submit.request_id for entry in chosen))

    def reset_workers(self) -> None:
        """All workers came back empty: whatever ran is preempted, steps in flight are forgotten."""
        for sequence in list(self.running):
            self._preempt(sequence)
        for request in self.requests.values():
            for sequence in request.sequences:
                sequence.in_flight = sequence.pending = 0
        self._steps.clear()
        self._released.clear()
        self.groups.forget()

    # ------------------------------------------------------------------------------------------ schedule

    def schedule(self) -> Batch | None:
        """The Batch of the next step, or None when nothing can be computed before an answer or a request arrives."""
        step = _Step()
        prefills = self._schedule_decodes(step)
        budget = policy.prefill_budget(
            len(step.scheduled),
            self._waiting_tokens + sum(s.num_known - s.num_scheduled for s in prefills),
            self.limits.ideal_step_tokens,
            self.limits.max_step_tokens,
            self.demand.ratio,
            self.limits.step_sizes,
        )
        for sequence in prefills:
            if budget <= 0:
                break
            if sequence.state is State.RUNNING:
                budget -= self._schedule_chunk(step, sequence, budget)
        budget = self._admit_forks(step, budget)
        self._admit_waiting(step, budget)
        if not step.scheduled:
            return None
        self._step += 1
        self._steps[self._step] = step.entries
        self.counters.step_tokens += step.num_tokens
        released, self._released = self._released, []
        return Batch("", self._step, step.scheduled, step.new, released, step.blocks, step.copies)

    def _schedule_decodes(self, step: _Step) -> list[Sequence]:
        """Give every decoding sequence its one token; returns the running sequences that still have a prompt to do."""
        prefills: list[Sequence] = []
        block_size = self.groups.block_size
        room = self.limits.max_step_tokens
        sliding = any(spec.window is not None for spec in self.groups.specs)
        scheduled, entries = step.scheduled, step.entries
        for sequence in list(self.running):
            if sequence.state is not RUNNING:
                continue  # preempted for one that came before it
            start = sequence.num_scheduled
            pending = sequence.pending
            num_output = len(sequence.output_ids) + pending
            total = sequence.num_prompt + num_output
            if total - start != 1 or (pending == 0 and start < sequence.num_prompt):
                if total > start:
                    prefills.append(sequence)
                continue
            if num_output >= sequence.max_output or room <= 0:
                continue
            if start >= sequence.capacity and not self._make_room(step, sequence, 1):
                continue
            if sliding and start % block_size == 0:
                self.groups.slide(sequence.tables, start)
            room -= 1
            sequence.num_scheduled = total
            sequence.pending = pending + 1
            sequence.in_flight += 1
            row = sequence.row
            scheduled.append(Scheduled(row, start, 1, True))
            entries[row] = (sequence, sequence.era, start, total, True)
        step.num_tokens = len(step.scheduled)
        return [s for s in prefills if s.state is RUNNING]

    def _schedule_chunk(self, step: _Step, sequence: Sequence, budget: int) -> int:
        """Compute up to `budget` known tokens of a running sequence; returns how many."""
        start = sequence.num_scheduled
        total = sequence.num_known + sequence.pending
        num_tokens = min(total - start, budget)
        missing = self.groups.missing(sequence.tables, start + num_tokens)
        if missing and not self._make_room(step, sequence, missing):
            return 0
        self.groups.slide(sequence.tables, start)
        end = start + num_tokens
        sample = end == total
        sampling = sequence.request.submit.sampling
        prompt_logprobs = (
            sampling.prompt_logprobs is not None
            and sequence.choice == 0
            and sequence.prompt_logprobs_done < len(sequence.prompt_ids) - 1
            and start < len(sequence.prompt_ids) - 1
        )
        self.counters.recomputed_tokens += max(0, min(end, sequence.highest) - start)
        sequence.highest = max(sequence.highest, end)
        sequence.num_scheduled = end
        sequence.in_flight += 1
        if sample:
            sequence.pending += 1
        step.num_tokens += num_tokens
        scheduled = Scheduled(sequence.row, start, num_tokens, sample, prompt_logprobs)
        if num_tokens == 1:
            step.scheduled.insert(0, scheduled)  # rows of one token come first
        else:
            step.scheduled.append(scheduled)
        step.entries[sequence.row] = (sequence, sequence.era, start, end, sample)
        if end >= len(sequence.prompt_ids) and sequence.request.forks and sequence.choice == 0:
            self._forks.extend((sequence, fork) for fork in sequence.request.forks)
            sequence.request.forks = []
        return num_tokens

    def _make_room(self, step: _Step, sequence: Sequence, count: int) -> bool:
        """Append `count` blocks to a running sequence, preempting others, or in the end itself, when none are free."""
        while not self.groups.can_take(count):
            candidates = [s for s in self.running if s.row not in step.entries]
            victim = policy.victim(candidates)
            self._preempt(victim)
            if victim is sequence:
                return False
        start = len(sequence.tables[0].ids)
        self.groups.grow(sequence.tables, count)
        sequence.capacity = len(sequence.tables[0].ids) * self.groups.block_size
        for group, table in enumerate(sequence.tables):
            step.blocks.append(RowBlocks(sequence.row, group, start, table.ids[start:]))
        return True

    # ------------------------------------------------------------------------------------------ admission

    def _admit_forks(self, step: _Step, budget: int) -> int:
        """Let forks begin at the last prompt token, on their parent's blocks; returns the budget that is left."""
        while self._forks and budget > 0 and self._free_rows:
            parent, fork = self._forks[0]
            if fork.state is not State.FORKING:
                self._forks.popleft()
                continue
            if parent.row in step.entries and parent.num_scheduled - len(parent.prompt_ids) <= 0:
                break  # the parent's prompt ends in this very step; a fork reads it in the next
            position = len(fork.prompt_ids) - 1
            tables = self.groups.new_tables()
            copies = None
            if parent.state is State.RUNNING and parent.num_scheduled > position:
                copies = self.groups.fork(parent.tables, tables, position)
            self._forks.popleft()
            if copies is None:
                self._wait(fork, State.WAITING)
                continue
            step.copies += [BlockCopy(group, src, dst) for group, src, dst in copies]
            self._start(step, fork, tables, position)
            budget -= self._schedule_chunk(step, fork, budget)
        return budget

    def _admit_waiting(self, step: _Step, budget: int) -> None:
        """Start waiting sequences in order while there are rows, blocks and budget; nobody overtakes."""
        held: list[Sequence] = []
        while budget > 0 and self._free_rows:
            sequence = self._first_begun() or self._fresh.first()
            if sequence is None:
                break
            if sequence.in_flight:  # preempted; an answer that it needs is still under way
                held.append(heapq.heappop(self._begun))
                continue
            keys = self._usable_keys(sequence)
            length = self.groups.match(keys)
            tables = self.groups.new_tables()
            self.groups.adopt(tables, keys, length)
            start = length * self.groups.block_size
            # Room for everything known, and a block for what comes, keeps the newcomer from being preempted at once.
            if not self.groups.can_take(self._blocks_wanted(sequence, length)):
                self.groups.release(tables)
                break
            self._take_turn(sequence, start)
            if sequence.state is State.WAITING and sequence.choice == 0 and sequence.request.cached_tokens is None:
                sequence.request.cached_tokens = start
                self.counters.cached_tokens += start
            sequence.published = length
            self._start(step, sequence, tables, start)
            budget -= self._schedule_chunk(step, sequence, budget)
        for sequence in held:
            heapq.heappush(self._begun, sequence)

    def _first_begun(self) -> Sequence | None:
        """The oldest sequence that waits and has begun before."""
        while self._begun:
            if self._begun[0].state in self._num_begun:
                return self._begun[0]
            heapq.heappop(self._begun)
        return None

    def _take_turn(self, sequence: Sequence, start: int) -> None:
        """The first of those that wait stops waiting. A fresh one is charged what it computes and what it may generate,
        for all of its choices; what it really generates is settled at its end."""
        cost = 0
        if sequence in self._fresh:
            sequence.request.begun = True
            cost = sequence.num_known - start
            for choice in (sequence, *sequence.request.forks):
                choice.charged = policy.expected_output(choice.max_output)
                cost += choice.charged
            self.counters.dequeued += 1
            self.counters.dequeued_tokens += sequence.num_prompt
        else:
            heapq.heappop(self._begun)
        self._unwait(sequence, cost)

    def _usable_keys(self, sequence: Sequence) -> list[bytes]:
        """Keys of the blocks that the prefix cache may serve: never the last token, whose logits are needed."""
        sampling = sequence.request.submit.sampling
        if sampling.prompt_logprobs is not None and sequence.prompt_logprobs_done < len(sequence.prompt_ids) - 1:
            return []
        if not self.groups.pools[0].caching:
            return []
        return sequence.block_keys(self.groups.block_size, (sequence.num_known - 1) // self.groups.block_size)

    def _blocks_wanted(self, sequence: Sequence, matched: int) -> int:
        """Free blocks without which a waiting sequence is not started."""
        known = sequence.num_known
        windows = [spec.window for spec in self.groups.specs]
        if all(window is not None for window in windows):
            known = min(known, max(window or 0 for window in windows) + self.limits.max_step_tokens)
            return self.groups.blocks_for(known + 1)
        return self.groups.blocks_for(known + 1) - matched

    def _start(self, step: _Step, sequence: Sequence, tables: list[BlockTable], start: int) -> None:
        """Give a sequence its row and tell the workers all about it."""
        row = self._free_rows.pop()
        sequence.row = row
        sequence.tables = tables
        sequence.capacity = len(tables[0].ids) * self.groups.block_size
        sequence.num_scheduled = sequence.num_computed = start
        sequence.state = State.RUNNING
        self.running.append(sequence)
        submit = sequence.request.submit
        step.new.append(
            NewSequence(
                row,
                sequence.choice,
                sequence.prompt_ids,
                sequence.output_ids,
                submit.sampling,
                submit.eos_ids,
                submit.adapter_slot,
            )
        )
        for group, table in enumerate(tables):
            if table.ids:
                step.blocks.append(RowBlocks(row, group, 0, list(table.ids)))

    def _wait(self, sequence: Sequence, state: State) -> None:
        sequence.state = state
        self._waiting_tokens += sequence.num_known
        if sequence.request.begun:
            heapq.heappush(self._begun, sequence)
            self._num_begun[state] += 1
        else:
            self._fresh.push(sequence, sequence.request.place)

    def _unwait(self, sequence: Sequence, cost: int = 0) -> None:
        self._waiting_tokens -= sequence.num_known
        if sequence in self._fresh:
            self._fresh.remove(sequence, cost)
        else:
            self._num_begun[sequence.state] -= 1

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's row and blocks; it waits at its old place and is computed again."""
        self._publish(sequence)
        self._leave(sequence)
        sequence.era += 1
        sequence.highest = max(sequence.highest, sequence.num_scheduled)
        sequence.num_scheduled = sequence.num_computed = sequence.published = sequence.publish_at = 0
        self.counters.preemptions += 1
        self._wait(sequence, State.PREEMPTED)
        self._orphan_forks(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Give back a running sequence's row and blocks."""
        self.groups.release(sequence.tables)
        self.running.remove(sequence)
        self._released.append(sequence.row)
        self._free_rows.append(sequence.row)
        sequence.row = -1
        sequence.capacity = 0

    def _end(self, sequence: Sequence) -> None:
        """A sequence is over; with the last one its request is."""
        if sequence.state is State.RUNNING:
            self._publish(sequence)
            self._leave(sequence)
        elif sequence.state in self._num_begun:
            self._unwait(sequence)
        sequence.state = State.FINISHED
        request = sequence.request
        if sequence.output_ids:
            shared = sequence.num_prompt if sequence.choice else request.cached_tokens or 0
            self.demand.observe(sequence.num_prompt - shared, len(sequence.output_ids))
        if sequence.charged:
            self._fresh.settle(request.place, len(sequence.output_ids) - sequence.charged)
        request.unfinished -= 1
        if request.unfinished == 0:
            del self.requests[request.submit.request_id]
        else:
            self._orphan_forks(sequence)

    def _orphan_forks(self, sequence: Sequence) -> None:
        """Choice 0 left before its prompt was done: its forks begin on their own."""
        if sequence.choice == 0:
            forks, sequence.request.forks = sequence.request.forks, []
            for fork in forks:
                if fork.state is State.FORKING:
                    self._wait(fork, State.WAITING)

    # ------------------------------------------------------------------------------------------ update

    def update(self, result: BatchResult) -> list[SequenceOutput]:
        """Take the answer to a step; returns the news of sequences that are still wanted."""
        entries = self._steps.pop(result.step, None)
        if entries is None:
            return []
        outputs: list[SequenceOutput] = []
        answers = {answer.row: answer for answer in result.results}
        for row, (sequence, era, start, end, sampled) in entries.items():
            sequence.in_flight -= 1
            if sampled:
                sequence.pending -= 1
            if sequence.state is FINISHED:
                continue
            current = era == sequence.era
            if current:
                sequence.num_computed = end
            answer = answers.get(row)
            if answer is not None and (output := self._take(sequence, answer, start)) is not None:
                outputs.append(output)
            if current and end >= sequence.publish_at and sequence.state is RUNNING:
                self._publish(sequence)
        return outputs

    def grammar_errors(self, result: BatchResult) -> dict[str, str]:
        """Requests that an answer says cannot go on, and why; those among them that are still wanted."""
        entries = self._steps.get(result.step, {})
        failed = [(entries[a.row][0], a.grammar_error) for a in result.results if a.grammar_error and a.row in entries]
        return {s.request.submit.request_id: error for s, error in failed if s.state is not FINISHED}

    def _take(self, sequence: Sequence, answer: RowResult, start: int) -> SequenceOutput | None:
        """Append an answer's tokens up to the end of the sequence. `start`: the first position that it computed."""
        request = sequence.request
        output_ids = sequence.output_ids
        first = len(output_ids)
        ids = answer.token_ids
        plain = len(ids) == 1 and not answer.prompt_logprobs
        if plain and 0 < first < sequence.max_output - 1 and ids[0] not in request.ends:
            # The common case, in as few operations as it takes: one more token in the middle of an answer.
            output_ids.append(ids[0])
            self.counters.output_tokens += 1
            if sequence.state is not RUNNING:
                self._waiting_tokens += 1
            submit = request.submit
            return SequenceOutput(
                submit.request_id, sequence.choice, first, ids, answer.logprobs, None, None, 0, [], submit.epoch
            )
        finish_reason: str | None = None
        stop_reason: int | None = None
        taken: list[int] = []
        for token in answer.token_ids:
            taken.append(token)
            if token in request.ends:
                finish_reason = "stop"
                stop_reason = token if token in request.submit.sampling.stop_token_ids else None
                break
            if first + len(taken) >= sequence.max_output:
                finish_reason = "length"
                break
        if sequence.state is not State.RUNNING:
            self._waiting_tokens += len(taken)
        sequence.output_ids.extend(taken)
        self.counters.output_tokens += len(taken)
        # A chunk that was computed again answers again; only what is new goes on.
        prompt_logprobs = answer.prompt_logprobs[max(0, sequence.prompt_logprobs_done - start) :]
        sequence.prompt_logprobs_done += len(prompt_logprobs)
        if not taken and not prompt_logprobs:
            return None
        output = SequenceOutput(
            request.submit.request_id,
            sequence.choice,
            first,
            taken,
            answer.logprobs[: len(taken)],
            finish_reason,
            stop_reason,
            (request.cached_tokens or 0) if first == 0 else 0,
            prompt_logprobs,
            request.submit.epoch,
        )
        if finish_reason is not None:
            self._end(sequence)
        return output

    def _publish(self, sequence: Sequence) -> None:
        """Offer full blocks whose KV is computed and whose tokens are known."""
        block_size = self.groups.block_size
        stop = min(sequence.num_computed, sequence.num_known) // block_size
        if stop > sequence.published:
            if self.groups.pools[0].caching:
                keys = sequence.block_keys(block_size, stop)
                self.groups.publish(sequence.tables, keys, sequence.published, stop)
            sequence.published = stop
        sequence.publish_at = (sequence.published + 1) * block_size


class _Step:
    """A Batch in the making."""

    __slots__ = ("blocks", "copies", "entries", "new", "num_tokens", "scheduled")

    def __init__(self) -> None:
        self.scheduled: list[Scheduled] = []
        self.entries: dict[int, Entry] = {}
        self.new: list[NewSequence] = []
        self.blocks: list[RowBlocks] = []
        self.copies: list[BlockCopy] = []
        self.num_tokens = 0
