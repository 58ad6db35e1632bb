"""Load: a fixed mixture of streams, their outcomes, and what they say undisturbed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai

from tests.e2e.serving import Server

PROMPTS = ["Tell me a long story.", "What is 47 + 385?", "Tell me about a fox.", "What is the capital of Hungary?"]
_NAMES = {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 40}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0, "seed": 1},  # the null device draws by the seed alone
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.8, "seed": 5, "n": 3},
    {"temperature": 0.7, "seed": 7, "logprobs": True, "top_logprobs": 2},
    {"temperature": 1.0, "seed": 9, "stop": ["zebra crossing", "the end of"]},
    {"temperature": 0.9, "seed": 3, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"seed": 13, "response_format": {"type": "json_schema", "json_schema": {"name": "names", "schema": _NAMES}}},
]


@dataclass
class Told:
    """What one client was told. `outcome`: "finished", or the code of the error that ended it."""

    texts: dict[int, str] = field(default_factory=dict)
    logprobs: list[tuple[str, float]] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    usage: int = 0
    outcome: str = "open"


def requests(count: int, tokens: int) -> list[dict[str, Any]]:
    """`count` requests of all kinds in turn, of `tokens` tokens each unless a stop string ends them."""
    return [
        {
            **KINDS[i % len(KINDS)],
            "messages": [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}],
            "max_tokens": tokens + i % 7,
        }
        for i in range(count)
    ]


class Load:
    """Runs requests at once, one thread each. `num_chunks` grows as clients hear something."""

    def __init__(self, server: Server, asked: list[dict[str, Any]]) -> None:
        self.told = [Told() for _ in asked]
        self.num_chunks = 0
        self._url = server.url + "/v1"
        self._threads = [
            threading.Thread(target=self._one, args=(request, told), daemon=True)
            for request, told in zip(asked, self.told, strict=True)
        ]

    def start(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def wait_chunks(self, count: int, timeout_s: float = 60) -> None:
        """Until the clients have heard `count` chunks in all."""
        deadline = time.monotonic() + timeout_s
        while self.num_chunks < count:
            assert time.monotonic() < deadline, f"{self.num_chunks} of {count} chunks"
            time.sleep(0.002)

    def join(self, timeout_s: float = 90) -> list[Told]:
        """Until every request has its ending; checks that none is lost."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        outcomes = self.outcomes()
        assert outcomes["open"] == 0, outcomes
        assert sum(outcomes.values()) == len(self.told)
        return self.told

    def outcomes(self) -> Counter[str]:
        return Counter(told.outcome for told in self.told)

    def _one(self, request: dict[str, Any], told: Told) -> None:
        try:
            with openai.OpenAI(base_url=self._url, api_key="x", max_retries=0, timeout=90) as typed:
                client: Any = typed
                stream = client.chat.completions.create(
                    model="tiny-chat",
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                    **request,
                )
                for chunk in stream:
                    self.num_chunks += 1
                    self._take(chunk, told)
                told.outcome = "finished"
        except openai.APIError as error:
            told.outcome = str(error.code or type(error).__name__)
        except Exception as error:  # a connection that is cut shows in many ways
            told.outcome = type(error).__name__

    def _take(self, chunk: Any, told: Told) -> None:
        if chunk.usage is not None:
            told.usage = chunk.usage.completion_tokens
        for choice in chunk.choices:
            told.texts[choice.index] = told.texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.logprobs is not None:
                told.logprobs += [(entry.token, entry.logprob) for entry in choice.logprobs.content or []]
            if choice.finish_reason is not None:
                assert choice.index not in told.reasons, "two endings"
                told.reasons[choice.index] = choice.finish_reason


def check_undisturbed(server: Server, asked: list[dict[str, Any]], disturb: Callable[[Load], None]) -> None:
    """Run `asked` twice, the second time with `disturb`: the same texts and usage.

    A request that came while a process was away may be refused with 503 `loading`; it has then heard nothing else.
    Every other one finishes.
    """
    expected = Load(server, asked).start().join()
    assert {told.outcome for told in expected} == {"finished"}, Counter(told.outcome for told in expected)
    load = Load(server, asked).start()
    disturb(load)
    told = load.join()
    outcomes = load.outcomes()
    assert outcomes["finished"] + outcomes["loading"] == len(asked), outcomes
    assert outcomes["finished"] >= len(asked) // 2, outcomes
    for request, one, two in zip(asked, expected, told, strict=True):
        if two.outcome == "loading":
            assert two.texts == {}, request
            continue
        assert one.texts == two.texts, request
        assert one.reasons == two.reasons, request
        assert one.usage == two.usage, request
        assert [token for token, _ in one.logprobs] == [token for token, _ in two.logprobs], request
        for (_, a), (_, b) in zip(one.logprobs, two.logprobs, strict=True):
            assert abs(a - b) < 1e-3, request
