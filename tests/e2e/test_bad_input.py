"""Whatever is sent, the answer is a 4xx that names the field, and nobody else's stream is disturbed by it."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.e2e.serving import Server

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = [{"role": "user", "content": "Hi."}]
LIMIT = 16 * 1024 * 1024  # --max-body-bytes by default
HUGE = "1" + "0" * 5000


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny-chat", "messages": HI, "max_tokens": 1, **fields}).encode()


def text(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny-chat", "prompt": "Hi.", "max_tokens": 1, **fields}).encode()


def raw(field: str, value: str) -> bytes:
    """A body with a value that json.dumps would not write."""
    return f'{{"model": "tiny-chat", "messages": [{{"role": "user", "content": "Hi."}}], "{field}": {value}}}'.encode()


def nested(depth: int) -> bytes:
    return b'{"model": "tiny-chat", "messages": ' + b"[" * depth + b"]" * depth + b"}"


INVALID = "invalid_request_error"
# what -> (path, body, status, code, param); the type of all is INVALID
BAD: dict[str, tuple[str, bytes, int, str, str | None]] = {
    "unknown model": (CHAT, chat(model="no-such"), 404, "model_not_found", "model"),
    "model of a wrong type": (CHAT, chat(model=5), 400, "invalid_type", "model"),
    "over-long chat": (
        *(CHAT, chat(messages=[{"role": "user", "content": "word " * 5000}])),
        *(400, "context_length_exceeded", "messages"),
    ),
    "over-long text": (TEXT, text(prompt="word " * 5000), 400, "context_length_exceeded", "prompt"),
    "over-long ids": (TEXT, text(prompt=[7] * 5000), 400, "context_length_exceeded", "prompt"),
    "ids outside the vocabulary": (TEXT, text(prompt=[5, 10**6]), 400, "invalid_value", "prompt"),
    "negative ids": (TEXT, text(prompt=[-1]), 400, "invalid_value", "prompt"),
    "no messages": (CHAT, b'{"model": "tiny-chat"}', 400, "missing_field", "messages"),
    "empty messages": (CHAT, chat(messages=[]), 400, "invalid_value", "messages"),
    "messages that are text": (CHAT, chat(messages="Hi."), 400, "invalid_type", "messages"),
    "content that is a number": (
        *(CHAT, chat(messages=[{"role": "user", "content": 5}])),
        *(400, "invalid_type", "messages[0].content"),
    ),
    "temperature as text": (CHAT, chat(temperature="hot"), 400, "invalid_type", "temperature"),
    "temperature below 0": (CHAT, chat(temperature=-0.1), 400, "invalid_value", "temperature"),
    "temperature of 1e308": (CHAT, chat(temperature=1e308), 400, "invalid_value", "temperature"),
    "temperature out of all range": (CHAT, raw("temperature", "1e999"), 400, "invalid_json", None),
    "NaN": (CHAT, raw("temperature", "NaN"), 400, "invalid_json", None),
    "Infinity": (CHAT, raw("top_p", "Infinity"), 400, "invalid_json", None),
    "top_p of 0": (CHAT, chat(top_p=0), 400, "invalid_value", "top_p"),
    "top_k below -1": (CHAT, chat(top_k=-2), 400, "invalid_value", "top_k"),
    "max_tokens below 0": (CHAT, chat(max_tokens=-5), 400, "invalid_value", "max_tokens"),
    "max_tokens of a fraction": (CHAT, chat(max_tokens=1.5), 400, "invalid_type", "max_tokens"),
    "max_tokens of 5,000 digits": (TEXT, raw("max_tokens", HUGE), 400, "invalid_json", None),
    "n of a million": (CHAT, chat(n=10**6), 400, "invalid_value", "n"),
    "n of 0": (CHAT, chat(n=0), 400, "invalid_value", "n"),
    "seed beyond 64 bits": (CHAT, chat(seed=2**70), 400, "invalid_value", "seed"),
    "stream as text": (CHAT, chat(stream="yes"), 400, "invalid_type", "stream"),
    "logit_bias of no token": (CHAT, chat(logit_bias={"999999": 1}), 400, "invalid_value", "logit_bias"),
    "logit_bias of no number": (CHAT, chat(logit_bias={"5": "much"}), 400, "invalid_type", "logit_bias"),
    "10,000 stop strings": (CHAT, chat(stop=[f"s{i}" for i in range(10_000)]), 400, "invalid_value", "stop"),
    "an empty stop string": (CHAT, chat(stop=[""]), 400, "invalid_value", "stop"),
    "a stop string of a megabyte": (CHAT, chat(stop="x" * 2**20), 400, "invalid_value", "stop"),
    "no JSON": (CHAT, b"model=tiny-chat", 400, "invalid_json", None),
    "no body": (CHAT, b"", 400, "invalid_json", None),
    "cut JSON": (CHAT, chat()[:-2], 400, "invalid_json", None),
    "a list": (CHAT, b"[1, 2]", 400, "invalid_type", None),
    "invalid UTF-8": (CHAT, chat().replace(b"Hi.", b"\xff\xfe\xc3"), 400, "invalid_json", None),
    "deep JSON": (CHAT, nested(100), 400, "invalid_json", None),
    "very deep JSON": (CHAT, nested(100_000), 400, "invalid_json", None),
    "a body over the limit": (CHAT, chat(user="x" * LIMIT), 413, "body_too_large", None),
    "no such path": ("/v1/no-such", b"{}", 404, "not_found", None),
}


def post(server: Server, path: str, body: bytes, method: str = "POST") -> tuple[int, dict[str, Any]]:
    """(status, error object). Also of a connection that the server closes before the body is through."""
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())["error"]
    finally:
        connection.close()


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=90) as client:
        yield client


def told(client: Any, max_tokens: int = 250) -> str:
    """The witness: a long drawn answer, streamed."""
    stream = client.chat.completions.create(
        model="tiny-chat",
        messages=[{"role": "user", "content": "Tell me a long story."}],
        temperature=1.0,
        seed=11,
        max_tokens=max_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def test_a_stream_runs_undisturbed_through_all_of_it(client: Any, server: Server) -> None:
    undisturbed = told(client)
    assert len(undisturbed) > 200
    pids = {role: process.pid for role, process in server.children().items()}
    told_again: list[str] = []
    sent = threading.Event()

    def bear_witness() -> None:
        while not sent.is_set():  # as long as bad requests come, a stream runs
            told_again.append(told(client))

    witness = threading.Thread(target=bear_witness)
    witness.start()
    wrong: dict[str, Any] = {}
    for what, (path, body, status, code, param) in BAD.items():
        found_status, error = post(server, path, body)
        found = (found_status, error["type"], error["code"], error["param"])
        if found != (status, INVALID, code, param) or not error["message"] or len(error["message"]) > 1000:
            wrong[what] = (found, error["message"])
    sent.set()
    witness.join()
    assert not wrong
    assert set(told_again) == {undisturbed}
    assert {role: process.pid for role, process in server.children().items()} == pids  # nobody was restarted
    with urllib.request.urlopen(server.url + "/stats", timeout=10) as answer:
        assert json.load(answer)["server"]["restarts"] == 0


def test_a_wrong_method_is_405(server: Server) -> None:
    status, error = post(server, CHAT, b"", "GET")
    assert (status, error["type"], error["code"]) == (405, INVALID, "method_not_allowed")


def test_many_bad_requests_at_once_leave_no_trace(client: Any, server: Server) -> None:
    statuses: list[int] = []

    def send() -> None:
        for what in ("unknown model", "over-long chat", "NaN", "deep JSON", "10,000 stop strings"):
            statuses.append(post(server, *BAD[what][:2])[0])

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    text_beside = told(client, max_tokens=40)
    for thread in threads:
        thread.join()
    assert sorted(set(statuses)) == [400, 404]
    assert len(statuses) == 40
    assert text_beside == told(client, max_tokens=40)
    with urllib.request.urlopen(server.url + "/stats", timeout=10) as answer:
        engine = json.load(answer)["engine"]
    assert engine["waiting"] == 0
