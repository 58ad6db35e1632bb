"""A worker process with fake ends: the test plays scheduler and supervisor on real sockets."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from core.channel import Server
from core.config import Config
from core.messages import FromWorker, Ready, ToSupervisor, WorkerReady
from core.model_info import resolve


class Harness:
    """The run folder of a few workers, and the two sockets that they speak to."""

    def __init__(self, folder: Path, config: Config) -> None:
        model = resolve(config.model)
        self.engine = model.engine
        self.folder = folder
        (folder / "config.json").write_bytes(config.to_json())
        (folder / "model.json").write_bytes(msgspec.json.encode(model))
        self.context: zmq.Context[Any] = zmq.Context()
        self.workers: Server[Any] = Server(self.context, f"ipc://{folder}/workers", FromWorker)
        self.control: Server[Any] = Server(self.context, f"ipc://{folder}/control", ToSupervisor)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, ranks: int = 1) -> list[WorkerReady]:
        """Start the ranks and wait for them."""
        for rank in range(ranks):
            command = [sys.executable, "-P", "-m", "models.runtime.worker"]
            command += ["--run-dir", str(self.folder), "--name", f"worker-{rank}"]
            self.processes.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
        return [self.receive() for _ in range(ranks)]

    def send(self, *messages: Any) -> None:
        """One frame to every rank."""
        for rank in range(len(self.processes)):
            self.workers.send(f"worker-{rank}", list(messages))

    def receive(self, timeout_s: float = 60.0) -> Any:
        """The next message of a worker."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if (frame := self.workers.receive(0.1)) is not None:
                (message,) = frame[1]
                return message
            codes = [process.poll() for process in self.processes]
            assert not any(codes), f"a worker ended: {codes}"
        raise AssertionError(f"no message within {timeout_s} s")

    def ready(self) -> Ready:
        """What the first worker told the supervisor."""
        frame = self.control.receive(30.0)
        assert frame is not None
        ready = frame[1][0]
        assert isinstance(ready, Ready)
        return ready

    def codes(self, timeout_s: float = 20.0) -> list[int]:
        """Wait for all workers to end; their exit codes."""
        return [process.wait(timeout_s) for process in self.processes]

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.workers.close()
        self.control.close()
        self.context.destroy(linger=0)


@pytest.fixture
def harness() -> Iterator[Callable[[Config], Harness]]:
    """Makes a Harness for a Config."""
    made: list[Harness] = []
    with tempfile.TemporaryDirectory(prefix="quire-test-") as folder:

        def make(config: Config) -> Harness:
            made.append(Harness(Path(folder), config))
            return made[-1]

        yield make
        for one in made:
            one.close()
