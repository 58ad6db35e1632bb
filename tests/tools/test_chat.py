"""`quire chat` over a pipe: a conversation of lines, its commands, and errors that end nothing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import pytest

import quire
from tests.e2e.serving import Server, serving
from tools import chat


class FakeClient:
    """Answers each conversation with its length and last message, in two pieces; "fail" is refused."""

    asked: list[list[dict[str, Any]]]
    samplings: list[quire.SamplingParams]

    def __init__(self, address: str | None = None) -> None:
        if address == "ipc:///nowhere":
            raise quire.QuireError("not_found", "no running Quire server was found")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def models(self) -> list[dict[str, Any]]:
        return [{"id": "the-model"}]

    def stream(
        self, *, messages: list[dict[str, Any]], model: str, sampling: quire.SamplingParams
    ) -> AbstractContextManager[Iterator[quire.Tokens]]:
        assert model == "the-model"
        self.asked.append([dict(message) for message in messages])
        self.samplings.append(sampling)
        last = messages[-1]["content"]
        if last == "fail":
            raise quire.QuireError("queue_full", "too many requests wait")
        pieces = iter([quire.Tokens(id="r", text=f"{len(messages)}:"), quire.Tokens(id="r", text=last.upper())])
        return _Leaving(pieces)


class _Leaving(AbstractContextManager[Iterator[quire.Tokens]]):
    def __init__(self, pieces: Iterator[quire.Tokens]) -> None:
        self._pieces = pieces

    def __enter__(self) -> Iterator[quire.Tokens]:
        return self._pieces

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `quire chat` on given lines: (exit code, stdout, stderr)."""
    monkeypatch.setattr(quire, "Client", FakeClient)
    monkeypatch.setattr(FakeClient, "asked", [], raising=False)
    monkeypatch.setattr(FakeClient, "samplings", [], raising=False)

    def run(lines: str, *args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = chat.main(list(args))
        return (code, *capsys.readouterr())

    return run


def test_a_conversation_grows(talk: Callable[..., tuple[int, str, str]]) -> None:
    assert talk("hello\n\n  \nagain\n") == (0, "1:HELLO\n3:AGAIN\n", "")
    assert FakeClient.asked[1] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "1:HELLO"},
        {"role": "user", "content": "again"},
    ]


def test_reset_keeps_the_system_prompt_only(talk: Callable[..., tuple[int, str, str]]) -> None:
    assert talk("a\n/reset\nb\n", "--system", "be brief") == (0, "2:A\n2:B\n", "")
    assert FakeClient.asked[1] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "b"}]


def test_exit_leaves(talk: Callable[..., tuple[int, str, str]]) -> None:
    assert talk("a\n/exit\nb\n") == (0, "1:A\n", "")


def test_a_refused_message_is_forgotten(talk: Callable[..., tuple[int, str, str]]) -> None:
    assert talk("a\nfail\nb\n") == (0, "1:A\n3:B\n", "error: too many requests wait\n")


def test_sampling_comes_from_the_options(talk: Callable[..., tuple[int, str, str]]) -> None:
    talk("a\n")
    talk("a\n", "--temperature", "0.7", "--top-p", "0.9", "--max-tokens", "5", "--seed", "3")
    greedy, drawn = FakeClient.samplings
    assert greedy.temperature == 0
    assert (drawn.temperature, drawn.top_p, drawn.max_tokens, drawn.seed) == (0.7, 0.9, 5, 3)


def test_no_server_is_1(talk: Callable[..., tuple[int, str, str]]) -> None:
    assert talk("a\n", "--address", "ipc:///nowhere") == (1, "", "quire chat: no running Quire server was found\n")


@pytest.fixture(scope="module")
def null_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("chat"), "--device", "null") as running:
        yield running


def client_address(server: Server) -> str:
    (found,) = [each for each in quire.find_servers() if each["pid"] == server.pid]
    return str(found["client_address"])


def test_piped_into_a_real_server(null_server: Server) -> None:
    command = [sys.executable, "-P", "-m", "tools.cli", "chat", "--address", client_address(null_server)]
    lines = "Hello.\nHello.\n/reset\nHello.\n"
    ended = subprocess.run([*command, "--max-tokens", "6"], input=lines, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.strip()
    wrong = subprocess.run([*command, "--model", "x"], input="Hello.\n", capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 0
    assert not wrong.stdout
    assert wrong.stderr.startswith("error: ")
    assert "'x'" in wrong.stderr


def test_status_of_a_real_server(null_server: Server) -> None:
    command = [sys.executable, "-P", "-m", "tools.cli", "status", "--interval", "0.1"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert null_server.url in shown
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, timeout=60, check=True).stdout)
    (mine,) = [each for each in found["servers"] if each["url"] == null_server.url]
    assert (mine["state"], mine["model"]) == ("ready", "tiny-chat")
    assert {each["name"] for each in mine["processes"]} == {
        *["supervisor", "scheduler", "tokenizer-0", "worker-0", "api-0"]
    }
    assert all(each["memory_bytes"] > 0 and Path("/proc", str(each["pid"])).exists() for each in mine["processes"])
