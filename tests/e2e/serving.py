"""A real server, as a newcomer starts it: `quire serve`, in processes of its own, on the built-in model."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

START_S = 90.0  # a slow, busy machine imports torch in tens of seconds


@dataclass
class Server:
    """A running `quire serve`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def children(self) -> dict[str, psutil.Process]:
        """Live child processes by their title's role ("scheduler", "worker 0" …)."""
        found = {}
        for child in psutil.Process(self.pid).children(recursive=True):
            try:
                title = " ".join(child.cmdline())
            except psutil.NoSuchProcess:  # it ended just now
                continue
            if title.startswith("quire: "):
                found[title.removeprefix("quire: ").strip()] = child
        return found

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(server: Server, timeout_s: float = START_S) -> None:
    """Until /health/ready answers 200; fails with the server's log when it ends or takes too long."""
    deadline = time.monotonic() + timeout_s
    trusting = ssl._create_unverified_context() if server.url.startswith("https:") else None
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            pytest.fail(f"the server ended with {server.process.returncode}:\n{server.log.read_text()}")
        try:
            with urllib.request.urlopen(server.url + "/health/ready", timeout=5, context=trusting) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.1)
    pytest.fail(f"the server was not ready after {timeout_s} s:\n{server.log.read_text()}")


@contextmanager
def serving(folder: Path, *args: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Start a server with extra arguments and variables; it is gone at the end, whatever happened."""
    port = free_port()
    log = folder / f"serve-{port}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tools.cli", "serve", *args, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
    scheme = "https" if "--ssl-certfile" in args else "http"
    server = Server(process, f"{scheme}://127.0.0.1:{port}", log)
    try:
        wait_ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)
