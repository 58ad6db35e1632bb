"""The simulator of pacing: nothing is lost or doubled, time adds up, policies differ as they must."""

from __future__ import annotations

import itertools

import pytest

from core import policy
from tools.bench.pacing import Outcome, StepModel, Workload, budget_of, figures, main, simulate

POLICIES = ["present", "present:64", "greedy", "chunk:48", "idle"]
MOST = 4096
CLOSED = Workload(40, concurrency=6, prompt_tokens=120, output_tokens=20, spread=0.5, seed=3)
OPEN = Workload(40, rate=60.0, prompt_tokens=120, output_tokens=20, spread=0.5, seed=3)


def run(name: str, load: Workload = CLOSED, model: StepModel | None = None, seqs: int = 256) -> Outcome:
    return simulate(load, budget_of(name, MOST), model, max_num_seqs=seqs, max_step_tokens=MOST)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("load", [CLOSED, OPEN], ids=["closed", "open"])
@pytest.mark.parametrize("seqs", [2, 256])
def test_nothing_is_lost_or_doubled(name: str, load: Workload, seqs: int) -> None:
    outcome = run(name, load, seqs=seqs)
    assert [course.endings for course in outcome.courses] == [1] * 40
    assert [len(course.token_s) for course in outcome.courses] == [course.wanted for course in outcome.courses]
    assert outcome.prompt_tokens == sum(course.prompt for course in outcome.courses)
    assert outcome.starved == 0
    for course in outcome.courses:
        times = [course.arrival_s, *course.token_s]
        assert all(a < b for a, b in itertools.pairwise(times))
    assert outcome.end_s == max(course.token_s[-1] for course in outcome.courses)


def test_no_more_are_in_flight_than_asked() -> None:
    courses = run("present").courses
    moments = sorted([(c.arrival_s, 1) for c in courses] + [(c.token_s[-1], -1) for c in courses])
    depth = list(itertools.accumulate(change for _, change in moments))
    assert max(depth) == 6


def test_a_policy_without_prefill_starves_all() -> None:
    outcome = run("none")
    assert outcome.starved == 40
    assert (outcome.num_steps, outcome.prompt_tokens) == (0, 0)
    assert not figures(outcome, 6).good(1e9)
    later = simulate(CLOSED, lambda decodes, backlog, ratio: 0 if decodes == 3 else 64, max_step_tokens=MOST)
    assert later.starved == 0  # three decode, end, and make room again


def test_the_same_seed_is_the_same_run() -> None:
    assert run("present", OPEN) == run("present", OPEN)
    other = Workload(40, rate=60.0, prompt_tokens=120, output_tokens=20, spread=0.5, seed=4)
    assert run("present", OPEN) != run("present", other)


def test_time_is_the_models() -> None:
    model = StepModel(1.0, 0.01, 0.1, 0.001, 10)
    alone = Workload(1, prompt_tokens=20, output_tokens=3, spread=0)
    (course,) = run("greedy", alone, model).courses
    first = 1.0 + 0.2 + 10 * 0.1 + 0.020
    assert course.token_s == pytest.approx([first, first + 1.01 + 0.021, first + 2.02 + 0.021 + 0.022])
    (course,) = run("chunk:10", alone, model).courses
    assert course.token_s[0] == pytest.approx(1.0 + 0.1 + 0.010 + 1.0 + 0.1 + 0.020)


def test_the_default_model_meets_the_figures_it_was_fitted_to() -> None:
    model = StepModel()
    wanted = {
        (1, 0, 640): 2.76,
        (8, 0, 8 * 640): 2.93,
        (64, 0, 64 * 640): 4.07,
        (8, 120, 8 * 640 + 452): 4.14,
        (62, 138, 62 * 640 + 443): 5.45,
        (124, 260, 124 * 640 + 2 * 447): 8.62,
        (124, 388, 124 * 640 + 2 * 415): 10.24,
        (250, 518, 250 * 640 + 3 * 426): 14.91,
        (0, 2048, 2048): 28.06,
    }
    for step, ms in wanted.items():
        assert 1000 * model.step_s(*step) == pytest.approx(ms, rel=0.05)


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_carries_what_the_policy_grants(name: str) -> None:
    mixed = run(name).mixed_prompt_tokens
    if name == "idle":
        assert mixed == []
    elif name == "chunk:48":
        assert max(mixed) == 48
    elif name == "greedy":
        assert max(mixed) > 100
    else:
        # With at most 5 decodes and 600 tokens waiting the ideal or the balance rules; a step is never fuller.
        ideal = 64 if name == "present:64" else 160
        balance = 1 + 5 * 3 * CLOSED.prompt_tokens / CLOSED.output_tokens  # of the first to end: 1.5 / 0.5
        assert 0 < max(mixed) <= max(ideal - 1, balance)


def test_present_is_the_policy_of_the_server() -> None:
    for decodes, backlog in [(0, 0), (1, 0), (200, 0), (3, 99_999)]:
        assert budget_of("present", MOST)(decodes, backlog, 0.0) == policy.prefill_budget(decodes, backlog, 160, MOST)


def test_prefill_first_is_sooner_and_less_even_than_small_chunks() -> None:
    load = Workload(64, concurrency=16, prompt_tokens=512, output_tokens=32)
    greedy, chunks = (figures(run(name, load), 16) for name in ("greedy", "chunk:32"))
    assert (greedy.ttft["p50"] or 0) < (chunks.ttft["p50"] or 0)
    assert (greedy.inter_token["p99"] or 0) > (chunks.inter_token["p99"] or 0)


@pytest.mark.parametrize("spec", ["", "chunk", "chunk:x", "chunk:0", "present:1:2", "greedy:5", "wrong"])
def test_policies_that_are_none(spec: str) -> None:
    with pytest.raises(ValueError):
        budget_of(spec, MOST)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--requests", "20", "--prompt-tokens", "40", "--output-tokens", "5"]
    assert main(["--concurrency", "1,4", "--policies", "present,none", *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in cells[1:]] == [["1", "present"], ["1", "none"], ["4", "present"], ["4", "none"]]
    assert [row[7] for row in cells[1:]] == ["0", "20", "0", "20"]
    assert main(["--rate", "50.5", *options]) == 0
    with pytest.raises(SystemExit):
        main(["--policies", "wrong"])
