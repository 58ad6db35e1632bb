"""quire.Client, AsyncClient and LLM against a real server with real weights: what a Python program sees."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import openai
import pytest

import quire
from tests.e2e.serving import Server

HUNGARY = [{"role": "user", "content": "What is the capital of Hungary?"}]
BUDAPEST = "The capital of Hungary is Budapest."
STORY = [{"role": "user", "content": "Tell me a long story."}]
GREEDY = quire.SamplingParams(temperature=0)
ENDLESS = quire.SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)


@pytest.fixture(scope="module")
def address(server: Server) -> str:
    (found,) = [each for each in quire.find_servers() if each["pid"] == server.pid]
    assert (found["url"], found["model"]) == (server.url, "tiny-chat")
    return str(found["client_address"])


@pytest.fixture
def client(address: str) -> Iterator[quire.Client]:
    with quire.Client(address, timeout_s=60) as client:
        yield client


def wait_counts(client: quire.Client, requests: int, aborted: int) -> None:
    """Until the engine has counted so many since its start and holds none; they may not be overshot.

    For a server of the test's own: /stats shows the last heartbeat, which may be older than the request before, so
    neither "idle" nor a difference to a count read earlier says anything on a server that others have just used.
    """
    deadline = time.monotonic() + 20
    while True:
        engine = client.stats()["engine"]
        assert engine["requests"] <= requests, engine
        assert engine["aborted"] <= aborted, engine
        if (engine["requests"], engine["aborted"], engine["running"], engine["waiting"]) == (requests, aborted, 0, 0):
            return
        assert time.monotonic() < deadline, engine
        time.sleep(0.1)


def test_messages(client: quire.Client) -> None:
    answer = client.generate("tiny-chat", messages=HUNGARY, sampling=GREEDY)
    assert answer.text == BUDAPEST
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert answer.completion_tokens == len(answer.token_ids)
    assert answer.prompt_tokens > 5


def test_text_and_ids_are_the_same_prompt(client: quire.Client) -> None:
    sampling = quire.SamplingParams(temperature=0, max_tokens=8)
    text = client.generate(prompt="def add(a, b):", sampling=sampling, want_prompt=True)
    assert text.prompt_text == "def add(a, b):"
    assert len(text.prompt_ids) == text.prompt_tokens
    ids = client.generate(prompt=text.prompt_ids, sampling=sampling)
    assert (ids.text, ids.token_ids) == (text.text, text.token_ids)
    assert 0 < len(ids.token_ids) <= 8


def test_http_and_zeromq_answer_the_same(client: quire.Client, server: Server) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=60) as http:
        typed: Any = http
        over_http = typed.chat.completions.create(
            model="tiny-chat", messages=STORY, temperature=1.0, seed=5, max_tokens=30
        )
    sampling = quire.SamplingParams(temperature=1.0, seed=5, max_tokens=30)
    over_zmq = client.generate(messages=STORY, sampling=sampling)
    assert over_zmq.text == over_http.choices[0].message.content
    assert over_zmq.prompt_tokens == over_http.usage.prompt_tokens


def test_a_stream_adds_up(client: quire.Client) -> None:
    with client.stream(messages=HUNGARY, sampling=GREEDY) as stream:
        events = list(stream)
    assert len(events) > 3
    assert "".join(event.text for event in events) == stream.completion.text == BUDAPEST
    assert [token_id for event in events for token_id in event.token_ids] == stream.completion.token_ids
    assert [event.finish_reason for event in events if event.finish_reason] == ["stop"]


def test_streams_interleave(client: quire.Client) -> None:
    capitals = {"Hungary": "Budapest", "France": "Paris", "Japan": "Tokyo"}
    asked = [[{"role": "user", "content": f"What is the capital of {country}?"}] for country in capitals]
    streams = [client.stream(messages=messages, sampling=GREEDY) for messages in asked]
    texts = [""] * len(streams)
    running = dict(enumerate(streams))
    while running:  # one event of each in turn
        for index, stream in list(running.items()):
            event = next(stream, None)
            if event is None:
                del running[index]
            else:
                texts[index] += event.text
    assert texts == [f"The capital of {country} is {city}." for country, city in capitals.items()]


def test_choices_and_logprobs(client: quire.Client) -> None:
    sampling = quire.SamplingParams(n=3, seed=7, temperature=1.0, max_tokens=12, logprobs=2)
    one, two = (client.generate(messages=STORY, sampling=sampling) for _ in range(2))
    assert [choice.token_ids for choice in one.choices] == [choice.token_ids for choice in two.choices]
    assert len({choice.text for choice in one.choices}) > 1
    for choice in one.choices:
        assert len(choice.logprobs) == len(choice.token_ids)
        for entry in choice.logprobs:
            assert entry.logprob <= 0
            assert [top[3] for top in entry.top] == sorted((top[3] for top in entry.top), reverse=True)


def test_generate_all_keeps_the_order(client: quire.Client) -> None:
    sums = [(1, 2), (47, 385), (12, 30), (9, 9), (100, 11)]
    prompts = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in sums]
    done: list[int] = []
    results = client.generate_all(None, prompts, GREEDY, max_running=2, on_done=lambda index, _: done.append(index))
    assert [result.text for result in results] == [f"{a} + {b} = {a + b}." for a, b in sums]
    assert sorted(done) == list(range(len(sums)))


def test_abort_by_name_ends_the_stream_with_an_error(client: quire.Client) -> None:
    stream = client.stream(messages=STORY, sampling=ENDLESS)
    next(stream)
    client.abort(stream.id)
    with pytest.raises(quire.QuireError) as caught:
        list(stream)
    assert caught.value.code == "aborted"


def test_every_way_out_is_one_abort(serve: Callable[..., AbstractContextManager[Server]]) -> None:
    with serve() as server:
        (found,) = [each for each in quire.find_servers() if each["pid"] == server.pid]
        with quire.Client(found["client_address"], timeout_s=60) as client:
            with client.stream(messages=STORY, sampling=ENDLESS) as stream:
                next(stream)
            wait_counts(client, 1, 1)
            stream = client.stream(messages=STORY, sampling=ENDLESS)
            next(stream)
            client.abort(stream.id)
            with pytest.raises(quire.QuireError, match="aborted"):
                list(stream)
            wait_counts(client, 2, 2)
            with pytest.raises(quire.QuireError) as caught:
                client.generate(messages=STORY, sampling=ENDLESS, timeout_s=0.3)
            assert caught.value.code == "deadline_exceeded"
            wait_counts(client, 3, 3)
            assert client.generate(messages=HUNGARY, sampling=GREEDY).text == BUDAPEST
            wait_counts(client, 4, 3)  # a natural ending is no abort, and no abort was counted late


def test_a_deadline_of_the_clients(client: quire.Client) -> None:
    with pytest.raises(quire.QuireError) as caught:
        client.generate(messages=STORY, sampling=ENDLESS, timeout_s=0.3)
    assert caught.value.code == "deadline_exceeded"


def test_models_and_stats(client: quire.Client) -> None:
    (model,) = client.models()
    assert (model["id"], model["object"]) == ("tiny-chat", "model")
    stats = client.stats()
    assert stats["state"] == "ready"
    assert stats["engine"]["kv_blocks_total"] > 0
    assert set(stats["workers"]) == {"worker-0"}
    assert stats["server"]["pid.scheduler"] > 0


@pytest.mark.parametrize(
    ("asked", "code", "param"),
    [
        ({"model": "no-such", "prompt": "a"}, "model_not_found", "model"),
        ({"prompt": [5] * 100_000}, "context_length_exceeded", "prompt"),
        ({"prompt": [10**9]}, "invalid_value", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": "a", "sampling": quire.SamplingParams(temperature=-1)}, "invalid_value", "temperature"),
        ({"prompt": "a", "sampling": quire.SamplingParams(temperature=float("nan"))}, "invalid_value", "temperature"),
        ({"prompt": "a", "sampling": quire.SamplingParams(stop=("x",) * 10_000)}, "invalid_value", "stop"),
        ({"prompt": "a", "messages": HUNGARY}, "invalid_request", "prompt"),
        ({"messages": []}, "invalid_value", "messages"),
    ],
)
def test_errors(client: quire.Client, asked: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(quire.QuireError) as caught:
        client.generate(**asked)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.message
    assert client.generate(messages=HUNGARY, sampling=GREEDY).text == BUDAPEST  # the connection goes on


async def test_async_client(address: str) -> None:
    async with quire.AsyncClient(address, timeout_s=60) as client:
        sums = [(1, 2), (47, 385), (12, 30)]
        asked = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in sums]
        answers = await asyncio.gather(*(client.generate(messages=messages, sampling=GREEDY) for messages in asked))
        assert [answer.text for answer in answers] == [f"{a} + {b} = {a + b}." for a, b in sums]
        pieces = [event.text async for event in client.stream(messages=HUNGARY, sampling=GREEDY)]
        assert len(pieces) > 3
        assert "".join(pieces) == BUDAPEST
        assert [model["id"] for model in await client.models()] == ["tiny-chat"]
        assert (await client.stats())["state"] == "ready"
        with pytest.raises(quire.QuireError) as caught:
            await client.generate("no-such", "a")
        assert caught.value.code == "model_not_found"


async def test_async_leaving_and_cancelling_free_the_request(address: str) -> None:
    async with quire.AsyncClient(address, timeout_s=60) as client:
        async with contextlib.aclosing(client.stream(messages=STORY, sampling=ENDLESS)) as stream:
            assert (await anext(stream)).token_ids
        task = asyncio.create_task(client.generate(messages=STORY, sampling=ENDLESS))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        deadline = time.monotonic() + 20
        while (await client.stats())["engine"]["running"]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


def test_llm_is_an_engine_of_its_own(server: Server) -> None:
    with quire.LLM("tiny-chat", max_num_seqs=4) as llm:
        results = llm.generate(["def add(a, b):", "import"], quire.SamplingParams(temperature=0, max_tokens=6))
        assert [len(result.token_ids) <= 6 and result.text != "" for result in results] == [True, True]
        assert llm.chat(HUNGARY, GREEDY).text == BUDAPEST
        pid = llm.client.stats()["server"]["pid.supervisor"]
        assert pid in [each["pid"] for each in quire.find_servers()]
        assert pid != server.pid
    assert pid not in [each["pid"] for each in quire.find_servers()]


def test_llm_that_cannot_start_says_why() -> None:
    with pytest.raises(quire.QuireError, match="no-such-folder") as caught:
        quire.LLM("./no-such-folder")
    assert caught.value.code == "engine_failed"
