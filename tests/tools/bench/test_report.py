"""Report: percentiles, waves, throughput and errors of made-up answers."""

from __future__ import annotations

import pytest

from tools.bench.client import Answer
from tools.bench.load import Load
from tools.bench.report import edge, notes, percentiles, report, row, steady, table
from tools.bench.sender import Sent


def answer(index: int, began_s: float, seconds: float = 1.0, tokens: int = 10) -> Answer:
    """`tokens` chunks, evenly over the second half of `seconds`."""
    half = seconds / 2
    step = half / tokens
    events = [began_s + half + step * (number + 1) for number in range(tokens)]
    return Answer(index, began_s, events, began_s + seconds, 200, 8, tokens)


def waves(count: int, concurrency: int) -> list[Answer]:
    """`count` waves of a second each, the requests of a wave a little apart."""
    return [answer(n, n // concurrency + 1e-6 * (n % concurrency)) for n in range(count * concurrency)]


def load(num_requests: int, concurrency: int, rate: float | None = None) -> Load:
    return Load("http://h", "m", num_requests, concurrency, 8, 10, rate=rate)


def sent(answers: list[Answer]) -> Sent:
    return Sent(answers, answers[0].began_s, max(a.ended_s for a in answers), [0.5])


def test_percentiles_interpolate() -> None:
    assert percentiles([4, 1, 3, 2]) == {"p50": 2.5, "p90": pytest.approx(3.7), "p99": pytest.approx(3.97)}
    assert percentiles([7]) == {"p50": 7, "p90": 7, "p99": 7}
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None}


def test_first_and_last_wave_are_dropped() -> None:
    answers = waves(5, 4)
    assert [a.index for a in steady(answers[::-1], 4)] == list(range(4, 16))
    assert len(steady(answers[:8], 4)) == 8  # two waves only: nothing would be left


def test_throughput_counts_the_full_house_only() -> None:
    answers = waves(6, 4)
    for late in answers[:4]:
        late.events = [late.began_s + 0.1 * n for n in range(1, 11)]  # the first wave: another speed
    result = report(load(24, 4), sent(answers))
    assert result["steady"]
    assert result["seconds"] == pytest.approx(4.0, abs=1e-4)
    assert result["requests_per_s"] == pytest.approx(4.0, rel=1e-3)
    assert result["output_tokens_per_s"] == pytest.approx(40.0, rel=1e-3)
    assert result["ttft_s"]["p99"] == pytest.approx(0.55)
    assert result["tpot_s"]["p50"] == pytest.approx(0.05)
    assert result["inter_token_s"]["p50"] == pytest.approx(0.05)
    assert result["end_to_end_s"]["p50"] == pytest.approx(1.0)
    assert (result["num_ok"], result["errors"], result["wrong_lengths"]) == (24, {}, 0)
    assert notes([result]) == []


def test_a_straggler_of_the_first_wave_is_outside_the_window() -> None:
    answers = waves(6, 4)
    straggler = answer(0, 0.0, seconds=2.5)
    result = report(load(24, 4), sent([straggler, *answers[1:]]))
    assert result["seconds"] == pytest.approx(5.0 - 2.5, abs=1e-4)


def test_too_few_requests_are_said_to_be_too_few() -> None:
    result = report(load(4, 4), sent(waves(1, 4)))
    assert not result["steady"]
    assert result["output_tokens_per_s"] == pytest.approx(40.0, rel=1e-3)
    assert "too few" in notes([result])[0]


def test_errors_are_counted_by_code_and_not_as_output() -> None:
    answers = waves(4, 2)
    refused = Answer(8, 1.0, [], 1.1, 429, error="queue_full")
    silent = Answer(9, 1.0, [], 1.1, 200)
    result = report(load(10, 2), sent([*answers, refused, silent]))
    assert result["errors"] == {"queue_full": 1, "no output": 1}
    assert (result["num_ok"], result["num_sent"]) == (8, 10)
    assert row(result)[-1] == "queue_full: 1, no output: 1"


def test_a_fixed_rate_drops_a_tenth_at_either_end() -> None:
    answers = [answer(n, 0.1 * n) for n in range(100)]
    timed = load(100, 1, rate=10.0)
    result = report(timed, sent(answers))
    assert edge(timed) == 10
    assert result["steady"]
    assert result["requests_per_s"] == pytest.approx(10.0, rel=0.05)
    assert result["ttft_s"]["p50"] == pytest.approx(0.55)
    assert row(result)[0] == "10/s"


def test_wrong_lengths_and_a_busy_client_are_noted() -> None:
    answers = waves(4, 2)
    answers[3].output_tokens = 9
    answers[4].prompt_tokens = 9
    answers[5].counted = True
    measured = sent(answers)
    measured.client_shares = [0.2, 0.97]
    said = notes([report(load(8, 2), measured)])
    assert len(said) == 3
    assert "2 requests had other lengths" in said[0]
    assert "1 answers without usage" in said[1]
    assert "97%" in said[2]


def test_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n|--:|--:|\n| 1 | 2 |"
