"""Heads of requests are bounded in size and in time; bodies and pipelined requests are not mistaken for heads."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from api import http_protocol
from api.http_protocol import MAX_HEAD_BYTES
from tests.api.serving import Doors, doors


def connect(url: str) -> socket.socket:
    place = urlsplit(url)
    assert place.port is not None
    return socket.create_connection((str(place.hostname), place.port), timeout=5)


def everything(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /version HTTP/1.1\r\nhost: x\r\nlong: ", b"a"),  # one header that never ends
        (b"GET /version HTTP/1.1\r\nhost: x\r\n", b"more: header\r\n"),  # headers that never end
        (b"GET /", b"a"),  # a path that never ends
    ],
    ids=["value", "headers", "path"],
)
def test_a_head_that_is_too_large(url: str, start: bytes, more: bytes) -> None:
    with connect(url) as connection:
        connection.sendall(start)
        for _ in range(20):
            connection.sendall((more * 5000)[:5000])
            connection.settimeout(0.02)
            try:
                answer = connection.recv(65536)
                break
            except TimeoutError:
                continue
        else:
            raise AssertionError("100,000 bytes were taken")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 ")
        assert b"connection: close" in head
        assert json.loads(body)["error"]["code"] == "head_too_large"


def test_a_large_head_within_the_bound_is_served(url: str) -> None:
    with connect(url) as connection:
        long = b"a" * (MAX_HEAD_BYTES - 200)
        connection.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\nlong: " + long + b"\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 200 ")


def test_requests_on_one_connection_are_counted_apart(url: str) -> None:
    body = json.dumps({"model": "tiny-chat", "prompt": "x" * 50_000}).encode()
    post = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    last = b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with connect(url) as connection:
        connection.sendall(post * 4 + last)
        answer = everything(connection)
    assert answer.count(b"HTTP/1.1 200 ") == 5
    assert b" 431 " not in answer


@pytest.fixture
def hasty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Doors]:
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.3)
    with doors(folder, step_s=0.2) as (running, _):
        yield running


@pytest.mark.parametrize("start", [b"", b"GET /version HTTP/1.1\r\nhost: "], ids=["nothing", "half a head"])
def test_a_head_that_does_not_end_is_cut_off(hasty: Doors, start: bytes) -> None:
    with connect(hasty.url) as connection:
        connection.sendall(start)
        assert everything(connection) == b""


def test_a_second_head_that_does_not_end_is_cut_off(hasty: Doors) -> None:
    with connect(hasty.url) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\nGET /ver")
        answer = everything(connection)
        assert answer.count(b"HTTP/1.1 200 ") == 1


def test_an_answer_may_take_longer_than_a_head(hasty: Doors) -> None:
    body = b'{"model": "tiny-chat", "prompt": "abc"}'  # five steps of 0.2 s
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    with connect(hasty.url) as connection:
        connection.sendall(head + body)
        assert everything(connection).startswith(b"HTTP/1.1 200 ")


def test_half_a_head_behind_a_running_answer_does_not_cut_it(hasty: Doors) -> None:
    body = b'{"model": "tiny-chat", "prompt": "abc"}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with connect(hasty.url) as connection:
        connection.sendall(head + body + b"GET /ver")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
