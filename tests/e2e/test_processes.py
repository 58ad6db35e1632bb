"""Processes: titles, order of death, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import psutil

from tests.e2e.serving import Server, wait_ready

Serve = Callable[..., AbstractContextManager[Server]]
ADD: list[Any] = [{"role": "user", "content": "What is 47 + 385?"}]


def ask(server: Server, messages: list[Any] = ADD, **extra: Any) -> Any:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=90) as client:
        return client.chat.completions.create(model="tiny-chat", messages=messages, temperature=0, **extra)


def run_folders() -> set[str]:
    root = Path(tempfile.gettempdir()) / f"quire-{os.getuid()}"
    return {str(path) for path in root.iterdir()} if root.exists() else set()


def wait_gone(processes: list[psutil.Process], timeout_s: float = 20) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert not alive, [" ".join(process.cmdline()) for process in alive]


def wait_no_folder(before: set[str], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while run_folders() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not run_folders() - before


def test_titles_and_sigterm(serve: Serve) -> None:
    before = run_folders()
    with serve("--device", "null", "--api-workers", "2", "--tokenizer-workers", "2") as server:
        children = server.children()
        assert set(children) == {"scheduler", "worker 0", "api 0", "api 1", "tokenizer 0", "tokenizer 1"}
        assert ask(server, max_tokens=5).usage.completion_tokens == 5
        assert server.stop() == 0
        wait_gone(list(children.values()))
    wait_no_folder(before)


def test_sigkill_of_the_supervisor_leaves_nothing(serve: Serve) -> None:
    before = run_folders()
    with serve("--device", "null") as server:
        children = list(server.children().values())
        os.kill(server.pid, signal.SIGKILL)
        wait_gone(children)
    wait_no_folder(before)


def test_api_stays_small_and_torch_free(server: Server) -> None:
    ask(server)
    for role in ("api 0", "scheduler", "tokenizer 0"):
        process = server.children()[role]
        maps = {Path(entry.path).name for entry in process.memory_maps()}
        assert not any("torch" in name for name in maps), role
    assert server.children()["api 0"].memory_full_info().uss < 100e6


def test_worker_death_is_survived(serve: Serve) -> None:
    text = "Tell me a long story."
    with (
        serve() as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0, timeout=90) as client,
    ):
        request: dict[str, Any] = {
            "model": "tiny-chat",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 400,
            "temperature": 1.0,
            "seed": 3,
            "extra_body": {"ignore_eos": True},
        }
        undisturbed = client.chat.completions.create(**request).choices[0].message.content
        stream = client.chat.completions.create(**request, stream=True)
        pieces = [next(stream).choices[0].delta.content or "" for _ in range(20)]
        worker = server.children()["worker 0"]
        worker.kill()
        pieces += [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == undisturbed
        assert server.children()["worker 0"].pid != worker.pid


def test_tensor_parallel_gives_the_same_and_restarts_together(serve: Serve, server: Server) -> None:
    with serve("--tensor-parallel-size", "2") as pair:
        ranks = {role: pair.children()[role] for role in ("worker 0", "worker 1")}
        assert ask(pair).choices[0].message.content == ask(server).choices[0].message.content == "47 + 385 = 432."
        story = [{"role": "user", "content": "Tell me a long story."}]
        told = [ask(each, messages=story).choices[0].message.content for each in (pair, server)]
        assert told[0] == told[1]
        ranks["worker 1"].kill()
        wait_gone(list(ranks.values()))
        wait_ready(pair)
        assert ask(pair).choices[0].message.content == "47 + 385 = 432."


def test_abandoned_connections_leave_no_request(server: Server) -> None:
    def drop() -> None:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0, timeout=30) as typed:
            client: Any = typed
            stream = client.chat.completions.create(
                model="tiny-chat", messages=ADD, stream=True, max_tokens=1000, extra_body={"ignore_eos": True}
            )
            next(stream)
            stream.close()

    threads = [threading.Thread(target=drop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with urllib.request.urlopen(server.url + "/stats", timeout=10) as answer:
            engine = json.load(answer)["engine"]
        if engine["running"] == engine["waiting"] == 0:
            break
        time.sleep(0.2)
    assert (engine["running"], engine["waiting"]) == (0, 0)
    assert ask(server).choices[0].message.content == "47 + 385 = 432."


def test_int4_is_the_same_on_two_ranks(serve: Serve) -> None:
    answers = []
    for ranks in ("1", "2"):
        with serve("--quantization", "int4", "--tensor-parallel-size", ranks) as server:
            answers.append(ask(server, max_tokens=40, logprobs=True).choices[0])
    one, two = answers
    assert one.message.content == two.message.content
    for a, b in zip(one.logprobs.content, two.logprobs.content, strict=True):
        assert abs(a.logprob - b.logprob) < 1e-3


def test_a_full_queue_is_429_with_retry_after(serve: Serve) -> None:
    options = ("--device", "null", "--null-step-ms", "20", "--max-num-seqs", "1", "--max-queued-requests", "2")
    with serve(*options) as server:
        outcomes: list[Any] = []
        waits: list[float] = []

        def one() -> None:
            try:
                outcomes.append(ask(server, max_tokens=20).usage.completion_tokens)
            except openai.RateLimitError as error:
                waits.append(float(error.response.headers["retry-after"]))
                outcomes.append(error.code)

        threads = [threading.Thread(target=one) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 12
        assert waits
        assert min(waits) >= 1
        assert set(outcomes) == {20, "queue_full"}
        assert outcomes.count(20) >= 3
        assert ask(server, max_tokens=3).usage.completion_tokens == 3
