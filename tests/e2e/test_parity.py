"""Answers through the whole stack against transformers.generate, token by token."""

from __future__ import annotations

import pytest

from tools.bench.parity import compare


def test_forty_answers_are_identical() -> None:
    different, num_tokens, longest = compare("tiny-chat", 40, max_tokens=150, seed=7)
    assert different == []
    assert num_tokens > 1000
    assert longest == 150


@pytest.mark.slow
def test_two_hundred_answers_with_long_stories_are_identical() -> None:
    different, _, longest = compare("tiny-chat", 200, max_tokens=600)
    assert different == []
    assert longest == 600
