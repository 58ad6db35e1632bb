"""`quire bench pacing`: pacing policies on a simulated clock; the real Scheduler, and a model of how long a step takes.

What the table says is as good as the step model. Its defaults were fitted to eleven steps on an H200 with an 8B
model in FP8 (tools/bench/RESULTS.md, with the output layer), and meet them within 5 %.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from core import policy
from core.messages import Batch, BatchResult, KVSpec, RowResult, Submit, TokenSegment
from core.scheduler import Limits, Scheduler
from quire import SamplingParams
from tools.bench.report import percentiles, table

BLOCK_SIZE = 16
AHEAD = 2  # steps: one runs, and one waits for it, as in the engine
EVERYTHING = 1 << 40

# (decoding sequences, prompt tokens that wait, prompt tokens per generated one) -> prompt tokens that ride along
Budget = Callable[[int, int, float], int]


@dataclass(frozen=True, slots=True)
class StepModel:
    """Seconds of a step from what is in it: products by the token, attention by the cached token that is read."""

    base_s: float = 2.765e-3
    token_s: float = 9.36e-6  # each token
    beyond_s: float = 3.45e-6  # each token beyond `knee`, in addition
    context_s: float = 20.4e-9  # each token of context, summed over the sequences of the step
    knee: int = 250

    def step_s(self, decodes: int, prompt_tokens: int, context: int) -> float:
        tokens = decodes + prompt_tokens
        beyond = max(0, tokens - self.knee)
        return self.base_s + self.token_s * tokens + self.beyond_s * beyond + self.context_s * context


@dataclass(frozen=True, slots=True)
class Workload:
    """What arrives. `rate` None: `concurrency` in flight at all times; else Poisson arrivals per second.

    `spread`: lengths are uniform within this share of the mean. At 0 all of a closed loop's requests end in one step
    and begin in one step, for ever, which no real load does.
    """

    num_requests: int
    concurrency: int = 1
    rate: float | None = None
    prompt_tokens: int = 512
    output_tokens: int = 256
    spread: float = 0.2
    seed: int = 0


@dataclass(slots=True)
class Course:
    """One request's way: when it arrived, and when each of its tokens came."""

    prompt: int
    wanted: int
    arrival_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    endings: int = 0


@dataclass(slots=True)
class Outcome:
    """A run. `starved`: requests that no further step would ever serve."""

    courses: list[Course]
    mixed_prompt_tokens: list[int] = field(default_factory=list)  # of each step with decodes and prefill
    num_steps: int = 0
    prompt_tokens: int = 0  # computed, over all steps
    end_s: float = 0.0

    @property
    def starved(self) -> int:
        return sum(course.endings == 0 for course in self.courses)


def budget_of(spec: str, max_step_tokens: int) -> Budget:
    """The policy that a word names: see `--policies`. Raises ValueError."""
    name, *numbers = spec.split(":")
    values = [int(number) for number in numbers]  # ValueError says which
    if any(value < 1 for value in values):
        raise ValueError(f"{spec}: numbers must be at least 1")
    match name, values:
        case "present", [] | [_]:
            ideal = values[0] if values else Limits(1, 1, 1).ideal_step_tokens
            return lambda decodes, backlog, ratio: policy.prefill_budget(
                decodes, backlog, ideal, max_step_tokens, ratio
            )
        case "greedy", []:
            return lambda decodes, backlog, ratio: EVERYTHING
        case "chunk", [tokens]:
            return lambda decodes, backlog, ratio: tokens
        case "idle", []:
            return lambda decodes, backlog, ratio: 0 if decodes else EVERYTHING
        case "none", []:
            return lambda decodes, backlog, ratio: 0
    raise ValueError(f"{spec}: give present, present:IDEAL, greedy, chunk:TOKENS, idle or none")


class PacedScheduler(Scheduler):
    """The real scheduler under another policy, which it is given by limits made for each step.

    With an ideal that is never reached the present policy grants all room there is; the room is then made what the
    policy under test grants.
    """

    def __init__(self, limits: Limits, num_blocks: int, budget: Budget) -> None:
        super().__init__(limits, [KVSpec(1, 1)], [num_blocks], BLOCK_SIZE, "bench", False)
        self._budget = budget
        self._most = limits.max_step_tokens

    def schedule(self) -> Batch | None:
        decodes, backlog = self.ahead()
        granted = max(0, self._budget(decodes, backlog, self.demand.ratio))
        step_tokens = min(self._most, decodes + granted)
        self.limits = Limits(self.limits.max_num_seqs, step_tokens, self.limits.max_model_len, EVERYTHING)
        return super().schedule()

    def ahead(self) -> tuple[int, int]:
        """Sequences that decode in the next step, and prompt tokens that wait. The pool is never short: no victims."""
        decodes = backlog = 0
        for request in self.requests.values():
            (sequence,) = request.sequences
            start, known = sequence.num_scheduled, sequence.num_known
            if sequence.pending or (start >= sequence.num_prompt and known - start == 1):
                decodes += len(sequence.output_ids) + sequence.pending < sequence.max_output
            else:
                backlog += known - start
        return decodes, backlog


class _Simulation:
    """The clock, what is in flight, and who comes next."""

    def __init__(self, load: Workload, budget: Budget, model: StepModel, max_num_seqs: int, max_step_tokens: int):
        rng = random.Random(load.seed)

        def around(mean: int) -> int:
            return max(1, round(mean * rng.uniform(1 - load.spread, 1 + load.spread)))

        courses = [Course(around(load.prompt_tokens), around(load.output_tokens)) for _ in range(load.num_requests)]
        longest = max(course.prompt + course.wanted for course in courses)
        blocks = max_num_seqs * (longest // BLOCK_SIZE + 3) + 2
        self.scheduler = PacedScheduler(Limits(max_num_seqs, max_step_tokens, longest + 1), blocks, budget)
        self.outcome = Outcome(courses)
        self.model = model
        self.arrivals: list[tuple[float, int]] = []
        self._closed = load.rate is None
        self._next = 0
        at = 0.0
        for _ in range(load.num_requests if load.rate is not None else min(load.concurrency, load.num_requests)):
            at += rng.expovariate(load.rate) if load.rate is not None else 0.0
            self._arrive(at)

    def _arrive(self, at: float) -> None:
        heapq.heappush(self.arrivals, (at, self._next))
        self.outcome.courses[self._next].arrival_s = at
        self._next += 1

    def run(self) -> Outcome:
        """Receive, schedule, answer; until nothing more can happen."""
        now = free_s = 0.0
        flying: list[tuple[float, Batch]] = []  # (when it is done, step), in order
        while True:
            self._receive(now)
            while len(flying) < AHEAD and (batch := self.scheduler.schedule()) is not None:
                free_s = max(free_s, now) + self._note(batch)
                flying.append((free_s, batch))
            if flying:
                now, batch = flying.pop(0)
                self._answer(batch, now)
            elif self.arrivals:
                now = max(now, self.arrivals[0][0])
            else:
                self.outcome.end_s = now
                return self.outcome

    def _receive(self, now: float) -> None:
        while self.arrivals and self.arrivals[0][0] <= now:
            _, number = heapq.heappop(self.arrivals)
            course = self.outcome.courses[number]
            sampling = SamplingParams(max_tokens=course.wanted, temperature=0)
            self.scheduler.add(Submit(str(number), "", [TokenSegment([1] * course.prompt)], sampling))

    def _note(self, batch: Batch) -> float:
        """Count a step; returns its seconds."""
        prompt_lengths = {s.row: s.request.sequences[0].num_prompt for s in self.scheduler.running}
        prefill = [row.num_tokens for row in batch.scheduled if row.start < prompt_lengths[row.row]]
        decodes = len(batch.scheduled) - len(prefill)
        context = sum(row.start + row.num_tokens for row in batch.scheduled)
        self.outcome.num_steps += 1
        self.outcome.prompt_tokens += sum(prefill)
        if decodes and prefill:
            self.outcome.mixed_prompt_tokens.append(sum(prefill))
        return self.model.step_s(decodes, sum(prefill), context)

    def _answer(self, batch: Batch, now: float) -> None:
        results = [RowResult(row.row, [7]) for row in batch.scheduled if row.sample]
        for output in self.scheduler.update(BatchResult("", batch.step, results)):
            course = self.outcome.courses[int(output.request_id)]
            course.token_s += [now] * len(output.token_ids)
            if output.finish_reason is not None:
                course.endings += 1
                if self._closed and self._next < len(self.outcome.courses):
                    self._arrive(now)


def simulate(
    load: Workload,
    budget: Budget,
    model: StepModel | None = None,
    *,
    max_num_seqs: int = 256,
    max_step_tokens: int = 4096,
) -> Outcome:
    """Run a workload to its end, or to where the policy starves it. The same arguments give the same outcome."""
    return _Simulation(load, budget, model or StepModel(), max_num_seqs, max_step_tokens).run()


@dataclass(frozen=True, slots=True)
class Figures:
    """A run without its first and last wave; milliseconds. None: there was nothing to measure."""

    tokens_per_s: float
    ttft: dict[str, float | None]
    inter_token: dict[str, float | None]
    mixed_tokens: float
    mixed_share: float
    starved: int

    def good(self, ttft_ms: float) -> bool:
        """TTFT p99 under a limit, inter-token p99 at most twice the median, nobody starved."""
        first, middle, late = self.ttft["p99"], self.inter_token["p50"], self.inter_token["p99"]
        if self.starved or first is None or middle is None or late is None:
            return False
        return first < ttft_ms and late <= 2 * middle


def figures(outcome: Outcome, wave: int) -> Figures:
    """Latencies of the requests between the waves; throughput while the house was full."""
    done = sorted((c for c in outcome.courses if c.endings), key=lambda c: c.arrival_s)
    begin, end, steady = 0.0, outcome.end_s, done
    if len(done) > 2 * wave:
        steady = done[wave:-wave]
        begin, end = steady[0].arrival_s, steady[-1].arrival_s
    tokens = sum(begin < at <= end for course in outcome.courses for at in course.token_s)
    gaps = [1000 * (b - a) for course in steady for a, b in zip(course.token_s, course.token_s[1:], strict=False)]
    mixed = outcome.mixed_prompt_tokens
    return Figures(
        tokens / (end - begin) if end > begin else 0.0,
        percentiles([1000 * (course.token_s[0] - course.arrival_s) for course in steady]),
        percentiles(gaps),
        sum(mixed) / len(mixed) if mixed else 0.0,
        len(mixed) / max(1, outcome.num_steps),
        outcome.starved,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table: a row per load and policy."""
    parser = argparse.ArgumentParser(prog="quire bench pacing", description=__doc__)
    parser.add_argument("--concurrency", default="1,8,16,32,64,128,256", help="closed loop: requests in flight")
    parser.add_argument("--rate", help="open loop instead: requests per second, Poisson, comma-separated")
    parser.add_argument("--requests", type=int, help="default: eight waves, at least 64")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--spread", type=float, default=0.2, help="lengths vary by this share of the mean")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--policies", default="present,greedy,chunk:128,idle", help="also present:IDEAL, chunk:TOKENS, none"
    )
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-step-tokens", type=int, default=4096)
    parser.add_argument("--ttft-ms", type=float, default=100.0, help="limit of the column good, at p99")
    model = StepModel()
    for name, help_text in {"base": "a step", "token": "a token", "beyond": "a token beyond the knee, more"}.items():
        default = getattr(model, f"{name}_s") * 1e6
        parser.add_argument(f"--{name}-us", type=float, default=default, help=f"microseconds of {help_text}")
    parser.add_argument("--context-ns", type=float, default=model.context_s * 1e9, help="nanoseconds per cached token")
    parser.add_argument("--knee", type=int, default=model.knee, help="tokens where products turn compute-bound")
    options = parser.parse_args(argv)
    if min(options.prompt_tokens, options.output_tokens, options.max_num_seqs) < 1 or not 0 <= options.spread < 1:
        parser.error("lengths and --max-num-seqs must be at least 1, --spread in [0, 1)")
    if options.max_step_tokens <= options.max_num_seqs:
        parser.error("--max-step-tokens must exceed --max-num-seqs, or a full house leaves no room for a prompt")
    if options.requests is not None and options.requests < 1:
        parser.error("--requests must be at least 1")
    model = StepModel(
        options.base_us * 1e-6,
        options.token_us * 1e-6,
        options.beyond_us * 1e-6,
        options.context_ns * 1e-9,
        options.knee,
    )
    rows = []
    try:
        policies = {name: budget_of(name, options.max_step_tokens) for name in options.policies.split(",")}
        loads = [float(text) for text in (options.rate or options.concurrency).split(",")]
    except ValueError as error:
        parser.error(str(error))
    if min(loads) <= 0 or (not options.rate and any(load != int(load) for load in loads)):
        parser.error("--concurrency and --rate must be positive, and --concurrency whole")
    for load in loads:
        wave = max(8, int(load)) if not options.rate else 0
        count = options.requests or max(64, 8 * wave)
        workload = Workload(
            count,
            max(1, int(load)),
            load if options.rate else None,
            options.prompt_tokens,
            options.output_tokens,
            options.spread,
            options.seed,
        )
        for name, budget in policies.items():
            outcome = simulate(
                workload,
                budget,
                model,
                max_num_seqs=options.max_num_seqs,
                max_step_tokens=options.max_step_tokens,
            )
            found = figures(outcome, wave or count // 10)
            rows.append([f"{load:g}", name, *_cells(found), "yes" if found.good(options.ttft_ms) else ""])
    header = ["rate" if options.rate else "C", "policy", "tokens/s", "TTFT p50 / p99 ms", "inter-token p50 / p99 ms"]
    print("Simulated, not measured: " + " ".join(["quire bench pacing", *(sys.argv[2:] if argv is None else argv)]))
    print(f"{model}\n")
    print(table([*header, "prompt tokens per mixed step", "mixed steps", "starved", "good"], rows))
    return 0


def _cells(found: Figures) -> list[str]:
    pairs = [
        " / ".join("-" if value is None else f"{value:.1f}" for value in (each["p50"], each["p99"]))
        for each in (found.ttft, found.inter_token)
    ]
    share = f"{100 * found.mixed_share:.0f} %"
    return [f"{found.tokens_per_s:,.0f}", *pairs, f"{found.mixed_tokens:.0f}", share, str(found.starved)]
