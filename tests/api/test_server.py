"""The api process itself, started as the supervisor starts it, between a fake supervisor and a fake tokenizer."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import zmq

from core.channel import Server
from core.config import Config
from core.messages import Heartbeat, Ready, Shutdown, StatsQuery, StatsReply, ToSupervisor
from core.model_info import ModelInfo
from core.stats import ApiSnapshot, decode
from quire import Client
from tests.api.serving import TEXT, FakeTokenizer

MODEL = ModelInfo("/m", "tiny-chat", "r1", "llama", [], 4096, 2048, [3])


class Supervisor:
    """Starts the process, and answers its control messages on a thread."""

    def __init__(self, folder: Path, *, http: bool = True) -> None:
        (folder / "config.json").write_bytes(Config(drain_timeout_s=5).to_json())
        (folder / "model.json").write_bytes(msgspec.json.encode(MODEL))
        self.server: Server[Any] = Server(zmq.Context.instance(), f"ipc://{folder}/control", ToSupervisor)
        self.seen: list[Any] = []
        listening = socket.socket()  # bound, but the process itself listens: as under `quire serve`
        listening.bind(("127.0.0.1", 0))
        self.http = http
        self.accepted_at_ready = False
        self.endpoint: tuple[str, int] = listening.getsockname()
        self.url = f"http://127.0.0.1:{self.endpoint[1]}"
        listening.set_inheritable(True)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "api.server", "--run-dir", str(folder), "--name", "api-0"),
                *("--parent", str(os.getpid())),
                *(("--fd", str(listening.fileno())) if http else ()),
            ],
            pass_fds=[listening.fileno()],
        )
        listening.close()
        self.orders: list[Any] = []
        self.closing = False
        self.thread = threading.Thread(target=self._answer, daemon=True)
        self.thread.start()

    def _answer(self) -> None:
        while not self.closing:
            frame = self.server.receive(0.02)
            for message in frame[1] if frame is not None else []:
                if isinstance(message, Ready) and self.http:
                    with contextlib.suppress(ConnectionRefusedError):
                        socket.create_connection(self.endpoint).close()
                        self.accepted_at_ready = True
                self.seen.append(message)
                if isinstance(message, StatsQuery):
                    self.server.send("api-0", [StatsReply(message.query_id, "ready", {})])
            while self.orders:
                self.server.send("api-0", [self.orders.pop()])

    def until(self, kind: type[Any], within_s: float = 10) -> Any:
        """Take the oldest unread message of a kind."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            for message in list(self.seen):
                self.seen.remove(message)
                if isinstance(message, kind):
                    return message
            time.sleep(0.01)
        raise AssertionError(f"no {kind.__name__}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.closing = True
        self.thread.join()
        self.server.close()


def test_the_process(folder: Path) -> None:
    tokenizer = FakeTokenizer(f"ipc://{folder}/tokenizer-0", step_s=0.2)
    supervisor = Supervisor(folder)
    try:
        assert supervisor.until(Ready).process == "api-0"
        assert supervisor.accepted_at_ready
        body = {"model": "tiny-chat", "prompt": "abc"}
        assert httpx.post(supervisor.url + "/v1/completions", json=body).json()["choices"][0]["text"] == TEXT
        with Client(f"ipc://{folder}/client") as client:
            assert client.generate("tiny-chat", "abc").text == TEXT
        process = psutil.Process(supervisor.process.pid)
        assert process.memory_info().rss < 100e6
        assert not any("torch" in region.path for region in process.memory_maps())
        while True:
            snapshot = decode(supervisor.until(Heartbeat).snapshot)
            assert isinstance(snapshot, ApiSnapshot)
            if snapshot.finished == 2:
                break
        assert snapshot.requests == 2
        assert snapshot.ttft.count == 2
        assert snapshot.inter_token.count == 8
        # A stream that runs at Shutdown ends in order; then the process does.
        with httpx.stream("POST", supervisor.url + "/v1/completions", json={**body, "stream": True}) as answer:
            chunks = answer.iter_text()
            text = next(chunks)
            supervisor.orders.append(Shutdown("end of the test"))
            text += "".join(chunks)
        assert text.endswith("data: [DONE]\n\n")
        assert supervisor.process.wait(5) == 0
        assert not (folder / "client").exists()
    finally:
        supervisor.close()
        tokenizer.close()


def test_the_process_without_http(folder: Path) -> None:
    tokenizer = FakeTokenizer(f"ipc://{folder}/tokenizer-0")
    supervisor = Supervisor(folder, http=False)
    try:
        assert supervisor.until(Ready).detail == "ZeroMQ"
        with Client(f"ipc://{folder}/client") as client:
            assert client.generate("tiny-chat", "abc").text == TEXT
        supervisor.orders.append(Shutdown())
        assert supervisor.process.wait(5) == 0
    finally:
        supervisor.close()
        tokenizer.close()
