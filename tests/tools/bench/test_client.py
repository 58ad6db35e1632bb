"""StreamClient against a fake server: what counts as output, however the bytes are cut."""

from __future__ import annotations

import json

import pytest

from core.errors import QuireError
from tests.tools.bench.fake_server import refusal, serving
from tools.bench.client import Answer, StreamClient

BODY = json.dumps({"prompt": [1, 2, 3], "max_tokens": 5}).encode()
CHAT = json.dumps({"messages": [{"role": "user", "content": "a b"}], "max_tokens": 4}).encode()


async def ask(url: str, path: str = "/v1/completions", body: bytes = BODY, keep_text: bool = False) -> Answer:
    client = StreamClient(url, keep_text=keep_text, timeout_s=5)
    answer = await client.ask(0, path, body)
    client.abandon()
    return answer


@pytest.mark.parametrize("cut", [0, 1, 7, 61])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
async def test_events_survive_any_cut(cut: int, newline: str) -> None:
    with serving(cut=cut, newline=newline) as fake:
        answer = await ask(fake.url)
        assert (answer.error, answer.status) == ("", 200)
        # The chunk that only says "length", the usage and [DONE] are no output.
        assert len(answer.events) == 5
        assert (answer.prompt_tokens, answer.output_tokens, answer.counted) == (3, 5, False)
        assert answer.began_s <= answer.events[0] <= answer.events[-1] <= answer.ended_s


async def test_the_role_chunk_of_a_chat_is_no_first_token() -> None:
    with serving(pause_s=0.05) as fake:
        answer = await ask(fake.url, "/v1/chat/completions", CHAT, keep_text=True)
    assert len(answer.events) == 4
    assert answer.ttft_s >= 0.1  # two pauses: the role's and the first token's
    assert answer.text.startswith('w0 "usage":')
    assert answer.text.count("w") == 4
    assert (answer.prompt_tokens, answer.output_tokens) == (9, 4)


async def test_without_usage_chunks_are_counted() -> None:
    with serving(send_usage=False) as fake:
        answer = await ask(fake.url)
    assert (answer.output_tokens, answer.counted) == (5, True)


async def test_a_refusal_is_told_by_its_code_and_the_connection_goes_on() -> None:
    with serving(fail=lambda body: refusal(429, "queue_full") if body["max_tokens"] == 5 else None) as fake:
        client = StreamClient(fake.url)
        first = await client.ask(0, "/v1/completions", BODY)
        second = await client.ask(1, "/v1/completions", BODY.replace(b"5", b"2"))
        client.abandon()
        assert (first.status, first.error, first.events) == (429, "queue_full", [])
        assert (second.error, second.output_tokens) == ("", 2)
        assert fake.connections == 1


async def test_an_error_event_within_a_stream() -> None:
    event = b'data: {"error": {"message": "m", "type": "server_error", "code": "worker_failed"}}\n\n'
    whole = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(event) + event
    with serving(fail=lambda body: whole) as fake:
        answer = await ask(fake.url)
    assert (answer.error, answer.events) == ("worker_failed", [])


async def test_a_connection_closed_while_idle_is_opened_again() -> None:
    with serving(close_after_answer=True) as fake:
        client = StreamClient(fake.url)
        answers = [await client.ask(index, "/v1/completions", BODY) for index in range(3)]
        client.abandon()
        assert [answer.error for answer in answers] == ["", "", ""]
        assert fake.connections == 3


async def test_a_cut_stream_is_an_error() -> None:
    half = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\ndata: {}\n\n"
    with serving(fail=lambda body: half, close_after_answer=True) as fake:
        answer = await ask(fake.url)
    assert answer.error == "connection lost"


async def test_a_stream_that_never_ends_is_an_error() -> None:
    with serving(pause_s=0.2) as fake:
        client = StreamClient(fake.url, timeout_s=0.5)
        answer = await client.ask(0, "/v1/completions", BODY)
    assert answer.error == "unfinished after 0.5 s"


async def test_nobody_listens() -> None:
    with serving() as fake:
        url = fake.url
    assert (await ask(url)).error.startswith("connect: ")


def test_a_url_that_cannot_be_spoken_to() -> None:
    with pytest.raises(QuireError, match="--url"):
        StreamClient("https://host")
