"""The ZeroMQ door with quire.Client and quire.AsyncClient, and with frames that no good client would send."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

import quire
from api import keys as keys_module
from api import zmq_server
from api.keys import Keys
from core.messages import ChatPrompt, TokensPrompt
from quire import Client, QuireError, SamplingParams
from tests.api.serving import TEXT, WORDS, Doors, FakeTokenizer, doors

Pair = tuple[Doors, FakeTokenizer]


@pytest.fixture
def client(pair: Pair) -> Iterator[Client]:
    with Client(pair[0].address, timeout_s=10) as client:
        yield client


def test_generate(client: Client, tokenizer: FakeTokenizer) -> None:
    sampling = SamplingParams(n=2, max_tokens=3, logprobs=1, prompt_logprobs=0, seed=5)
    result = client.generate("tiny-chat", "abc", sampling=sampling, want_prompt=True, priority=4)
    assert (result.prompt_tokens, result.completion_tokens, result.cached_tokens) == (3, 6, 2)
    assert (result.prompt_ids, result.prompt_text) == ([1, 2, 3], "abc")
    assert result.prompt_logprobs[0] is None
    assert [(c.index, c.text, c.token_ids, c.finish_reason) for c in result.choices] == [
        (0, "Hello wör", [10, 11, 12], "length"),
        (1, "Hello wör", [10, 11, 12], "length"),
    ]
    assert result.choices[1].logprobs[2] == quire.TokenLogprob(
        12, " wör", " wör".encode(), -0.25, 0, [(12, " wör", " wör".encode(), -0.25)]
    )
    assert tokenizer.requests[-1].sampling == sampling
    assert tokenizer.requests[-1].priority == 4


def test_stream_of_a_chat(client: Client, tokenizer: FakeTokenizer) -> None:
    stream = client.stream("tiny-chat", messages=[{"role": "user", "content": "hi"}])
    assert [event.text for event in stream] == WORDS
    assert stream.completion.text == TEXT
    assert isinstance(tokenizer.requests[-1].prompt, ChatPrompt)
    assert tokenizer.requests[-1].sampling.temperature == 0.0  # the model's default


def test_streams_interleave(client: Client) -> None:
    one, two = client.stream(None, "a"), client.stream(None, [1, 2])
    assert [(a.text, b.text) for a, b in zip(one, two, strict=True)] == [(word, word) for word in WORDS]


def test_generate_all(client: Client, tokenizer: FakeTokenizer) -> None:
    done: list[int] = []
    prompts: list[Any] = [f"p{index}" for index in range(50)] + [[5, 6], [{"role": "user", "content": "x"}]]
    results = client.generate_all(None, prompts, max_running=8, on_done=lambda index, _: done.append(index))
    assert [result.text for result in results] == [TEXT] * 52
    assert sorted(done) == list(range(52))
    assert TokensPrompt([5, 6]) in [request.prompt for request in tokenizer.requests[-8:]]
    with pytest.raises(QuireError, match="9999 tokens"):
        client.generate_all(None, ["a", "reject", "hang"])


def test_models_and_stats(client: Client) -> None:
    assert client.models()[0]["id"] == "tiny-chat"
    assert client.stats()["state"] == "ready"


@pytest.mark.parametrize(
    ("options", "code", "param"),
    [
        ({"prompt": "reject"}, "context_length_exceeded", "prompt"),
        ({"prompt": "busy"}, "queue_full", None),
        ({"prompt": "fail"}, "worker_failed", None),
        ({"model": "other", "prompt": "a"}, "model_not_found", "model"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [4096]}, "invalid_value", "prompt"),
        ({"prompt": ["a"]}, "invalid_type", "prompt[0]"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": 3}]}, "invalid_type", "messages[0].role"),
        ({"prompt": "a", "sampling": SamplingParams(temperature=math.nan)}, "invalid_value", "temperature"),
        ({"prompt": "a", "sampling": SamplingParams(n=0)}, "invalid_value", "n"),
        ({"prompt": "a", "priority": 2**40}, "invalid_value", "priority"),
    ],
)
def test_errors(client: Client, options: dict[str, Any], code: str, param: str | None) -> None:
    with pytest.raises(QuireError) as caught:
        client.generate(**options)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert client.generate(None, "a").text == TEXT  # the connection is none the worse


def test_leaving_a_stream_aborts(client: Client, tokenizer: FakeTokenizer) -> None:
    before = len(tokenizer.aborted)
    with client.stream(None, "flood") as stream:
        next(stream)
    tokenizer.wait_for_abort(before + 1)


def test_abort_is_an_ending(client: Client, tokenizer: FakeTokenizer) -> None:
    before = len(tokenizer.aborted)
    stream = client.stream(None, "hang")
    client.abort(stream.id)
    with pytest.raises(QuireError) as caught:
        next(stream)
    assert caught.value.code == "aborted"
    if len(tokenizer.aborted) > before:  # unless it was aborted before it was sent on
        assert tokenizer.aborted[-1] == tokenizer.requests[-1].request_id


def test_timeout_aborts(client: Client, tokenizer: FakeTokenizer) -> None:
    before = len(tokenizer.aborted)
    with pytest.raises(QuireError) as caught:
        client.generate(None, "hang", timeout_s=0.2)
    assert caught.value.code == "deadline_exceeded"
    tokenizer.wait_for_abort(before + 1)


def test_a_client_that_vanishes(pair: Pair, tokenizer: FakeTokenizer) -> None:
    before = len(tokenizer.aborted)
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(pair[0].address)
    request = quire.GenerateRequest(id="x", prompt="flood")
    socket.send(msgspec.msgpack.encode([quire.Hello(protocol=1), request]))
    socket.recv()
    socket.close(0)
    context.term()
    tokenizer.wait_for_abort(before + 1)


def test_a_client_that_does_not_read(pair: Pair, tokenizer: FakeTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_server, "MAX_OUTBOX", 300)
    before = len(tokenizer.aborted)
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.connect(pair[0].address)
    try:
        socket.send(pack({"type": "hello", "protocol": 1}, {"type": "generate", "id": "x", "prompt": "flood"}))
        tokenizer.wait_for_abort(before + 1, within_s=20)
        answers: list[Any] = []
        while not answers or answers[-1]["type"] != "error":
            assert socket.poll(3000)
            answers += msgspec.msgpack.decode(socket.recv())
        assert [a["code"] for a in answers if a["type"] in ("error", "finished")] == ["client_too_slow"]
        assert not socket.poll(100)
    finally:
        socket.close(0)
        context.term()


class Raw:
    """A socket that says anything."""

    def __init__(self, address: str) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.connect(address)

    def ask(self, *parts: bytes) -> list[Any]:
        self.socket.send_multipart(parts)
        assert self.socket.poll(3000), "no answer"
        answer: list[Any] = msgspec.msgpack.decode(self.socket.recv())
        return answer


@pytest.fixture
def raw(pair: Pair) -> Iterator[Raw]:
    raw = Raw(pair[0].address)
    yield raw
    raw.socket.close(0)
    raw.context.term()


def pack(*messages: Any) -> bytes:
    return msgspec.msgpack.encode(list(messages))


def test_hello_and_versions(raw: Raw) -> None:
    assert raw.ask(pack({"type": "hello", "protocol": 1, "new_field": 5})) == [
        {"type": "welcome", "protocol": 1, "server": "1.2.3", "models": ["tiny-chat"]}
    ]
    (error,) = raw.ask(pack({"type": "hello", "protocol": 2}))
    assert (error["type"], error["id"], error["code"]) == ("error", "", "protocol_error")
    assert "speaks protocol 1, the client 2" in error["message"]


def test_hello_comes_first(raw: Raw) -> None:
    (error,) = raw.ask(pack({"type": "models", "id": "m"}))
    assert (error["id"], error["code"]) == ("m", "protocol_error")


def test_hello_names_requests_that_are_lost(raw: Raw) -> None:
    welcome, error = raw.ask(pack({"type": "hello", "protocol": 1, "running": ["r9"]}))
    assert welcome["type"] == "welcome"
    assert (error["id"], error["code"]) == ("r9", "engine_failed")


@pytest.mark.parametrize(
    ("parts", "request_id"),
    [
        ([b""], ""),
        ([b"\xc1"], ""),
        ([b"\x91" * 5000], ""),
        ([pack(5)], ""),
        ([pack({"type": "nonsense"})], ""),
        ([pack({"type": "hello"})], ""),
        ([msgspec.msgpack.encode({"type": "hello", "protocol": 1})], ""),
        ([b"a", b"b"], ""),
        ([pack({"type": "generate", "id": "g", "prompt": 5})], "g"),
        ([pack({"type": "generate", "id": "g", "prompt": "x", "sampling": {"temperature": "hot"}})], "g"),
        ([pack({"type": "generate", "id": "g", "prompt": "x", "sampling": {"tempreature": 1}})], "g"),
        ([pack({"type": "hello", "protocol": 1}), b"x"], ""),
    ],
    ids=range(12),
)
def test_malformed_frames(raw: Raw, parts: list[bytes], request_id: str, client: Client) -> None:
    (error,) = raw.ask(*parts)
    assert (error["type"], error["id"]) == ("error", request_id)
    unknown = error.get("param") == "sampling.tempreature"
    code = "unknown_field" if unknown else "invalid_type"
    assert error["code"] == (code if request_id else "protocol_error")
    assert client.generate(None, "a").text == TEXT


def test_good_messages_of_a_malformed_frame_are_served(raw: Raw) -> None:
    answers = raw.ask(pack({"type": "hello", "protocol": 1}, {"type": "bad"}, {"type": "models", "id": "m"}))
    while len(answers) < 3:
        answers += msgspec.msgpack.decode(raw.socket.recv())
    assert sorted(answer["type"] for answer in answers) == ["error", "models", "welcome"]


def test_an_id_in_use(raw: Raw) -> None:
    generate = {"type": "generate", "id": "g", "prompt": "hang"}
    welcome, *rest = raw.ask(pack({"type": "hello", "protocol": 1}, generate, generate))
    assert welcome["type"] == "welcome"
    assert [answer["code"] for answer in rest if answer["type"] == "error"] == ["protocol_error"]


def test_generate_and_abort_in_one_frame(raw: Raw) -> None:
    frame = pack(
        {"type": "hello", "protocol": 1},
        {"type": "generate", "id": "g", "prompt": "hang"},
        {"type": "abort", "id": "g"},
    )
    answers = raw.ask(frame)
    while len(answers) < 2:
        answers += msgspec.msgpack.decode(raw.socket.recv())
    assert [(answer["type"], answer.get("code")) for answer in answers] == [("welcome", None), ("error", "aborted")]


async def test_async_client(pair: Pair, tokenizer: FakeTokenizer) -> None:
    async with quire.AsyncClient(pair[0].address, timeout_s=10) as client:
        assert (await client.models())[0]["id"] == "tiny-chat"
        assert (await client.stats())["state"] == "ready"
        results = await asyncio.gather(*(client.generate(None, f"p{index}") for index in range(20)))
        assert [result.text for result in results] == [TEXT] * 20
        assert [event.text async for event in client.stream(None, "a")] == WORDS
        with pytest.raises(QuireError, match="9999"):
            await client.generate(None, "reject")
        before = len(tokenizer.aborted)
        async with contextlib.aclosing(client.stream(None, "flood")) as stream:
            async for _ in stream:
                break
        task = asyncio.create_task(client.generate(None, "hang"))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(QuireError, match="timeout_s"):
            await client.generate(None, "hang", timeout_s=0.1)
        await asyncio.to_thread(tokenizer.wait_for_abort, before + 3)


def test_a_server_that_is_not_there(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quire, "_DEAD_S", 0.3)
    monkeypatch.setattr(quire, "_HEARTBEAT_S", 0.1)
    began = time.monotonic()
    with Client(f"ipc://{folder}/nobody") as client, pytest.raises(QuireError) as caught:
        client.generate(None, "a")
    assert caught.value.code == "engine_failed"
    assert time.monotonic() - began < 2


def test_find_servers(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert quire.find_servers() == []
    with pytest.raises(QuireError) as caught:
        Client()
    assert caught.value.code == "not_found"
    for name, pid in (("alive", os.getpid()), ("dead", 2**22 + 1)):
        place = folder / f"quire-{os.getuid()}" / name
        place.mkdir(parents=True)
        (place / "server.json").write_text(json.dumps({"client_address": f"ipc://{name}", "pid": pid}))
    assert [server["client_address"] for server in quire.find_servers()] == ["ipc://alive"]


KEY = "sk-of-alice"


@pytest.fixture
def key_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(keys_module, "CHECK_S", 0.01)
    file = folder / "keys"
    file.write_text(f"alice: {KEY}\n")
    return file


@pytest.fixture
def keyed(folder: Path, key_file: Path) -> Iterator[Pair]:
    keys = Keys([], str(key_file))
    keys.load()
    with doors(folder, keys=keys) as running:
        yield running


def test_only_this_user_may_open_the_socket(pair: Pair) -> None:
    assert stat.S_IMODE(os.stat(pair[0].address.removeprefix("ipc://")).st_mode) == 0o600


def test_a_key_opens_the_door(keyed: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    with Client(keyed[0].address, timeout_s=10, api_key=KEY) as client:
        assert client.generate(None, "abc").text == TEXT
        assert client.stats()["state"] == "ready"
        client.generate(None, "abc", user="ada")
    (anonymous, named) = keyed[1].requests
    assert anonymous.tenant == "alice"
    assert (anonymous.user, named.user, named.tenant) == ("", "ada", anonymous.tenant)
    monkeypatch.setenv("QUIRE_API_KEY", f" {KEY} ,another")
    with Client(keyed[0].address, timeout_s=10) as client:
        assert client.models()[0]["id"] == "tiny-chat"


@pytest.mark.parametrize("key", [None, "", "wrong", KEY[:-1], KEY + " "])
def test_without_the_key_nothing_is_answered(keyed: Pair, monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    for call in ("generate", "models", "stats"):
        with Client(keyed[0].address, timeout_s=10, api_key=key) as client, pytest.raises(QuireError) as caught:
            getattr(client, call)(*((None, "abc") if call == "generate" else ()))
        assert caught.value.code == "invalid_api_key"
    assert keyed[1].requests == []
    assert keyed[0].engine.counts.errors["invalid_api_key"] == 3


async def test_async_client_with_and_without_the_key(keyed: Pair) -> None:
    async with quire.AsyncClient(keyed[0].address, timeout_s=10, api_key=KEY) as client:
        assert (await client.generate(None, "abc")).text == TEXT
    async with quire.AsyncClient(keyed[0].address, timeout_s=10, api_key="wrong") as client:
        with pytest.raises(QuireError) as caught:
            await client.generate(None, "abc")
    assert caught.value.code == "invalid_api_key"


def test_a_hello_without_a_key_is_told_so(keyed: Pair) -> None:
    raw = Raw(keyed[0].address)
    try:
        for hello in ({"type": "hello", "protocol": 1}, {"type": "hello", "protocol": 1, "api_key": "wrong"}):
            (error,) = raw.ask(pack(hello))
            assert (error["type"], error["id"], error["code"]) == ("error", "", "invalid_api_key")
            (error,) = raw.ask(pack({"type": "models", "id": "m"}))
            assert (error["id"], error["code"]) == ("m", "invalid_api_key")
        (welcome,) = raw.ask(pack({"type": "hello", "protocol": 1, "api_key": KEY}))
        assert welcome["type"] == "welcome"
        (models,) = raw.ask(pack({"type": "models", "id": "m"}))
        assert models["type"] == "models"
        # A later hello with another key takes the place of the first.
        raw.ask(pack({"type": "hello", "protocol": 1, "api_key": "wrong"}))
        (error,) = raw.ask(pack({"type": "models", "id": "m"}))
        assert error["code"] == "invalid_api_key"
    finally:
        raw.socket.close(0)
        raw.context.term()


def test_a_revoked_key_opens_nothing_more(keyed: Pair, key_file: Path) -> None:
    raw = Raw(keyed[0].address)
    try:
        (welcome,) = raw.ask(pack({"type": "hello", "protocol": 1, "api_key": KEY}))
        assert welcome["type"] == "welcome"
        key_file.write_text("bob: another-key\n")
        deadline = time.monotonic() + 5
        while (answer := raw.ask(pack({"type": "models", "id": "m"}))[0])["type"] == "models":
            assert time.monotonic() < deadline
        assert answer["code"] == "invalid_api_key"
        assert "no longer valid" in answer["message"]
    finally:
        raw.socket.close(0)
        raw.context.term()


def test_a_name_of_ones_own_is_refused_with_keys(keyed: Pair) -> None:
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, b"alice")
    socket.connect(keyed[0].address)
    try:
        socket.send(pack({"type": "hello", "protocol": 1, "api_key": KEY}, {"type": "models", "id": "m"}))
        assert socket.poll(3000)
        errors = msgspec.msgpack.decode(socket.recv())
        assert [(error["id"], error["code"]) for error in errors] == [("", "protocol_error"), ("m", "invalid_api_key")]
    finally:
        socket.close(0)
        context.term()
