"""A server for the length of a measurement."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import quire
from core.config import without_secrets


@contextmanager
def running(*options: str, timeout_s: float = 600.0) -> Iterator[dict[str, Any]]:
    """Start `quire serve` on any free port; gives its server.json, with the seconds that it took as "start_s".

    Raises RuntimeError when it ends before it is ready.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tools.cli", "serve", *options, "--port", "0", "--die-with-parent"],
        stdout=subprocess.PIPE,
        text=True,
        env=without_secrets(os.environ),  # the measuring clients send no key
    )
    try:
        lines: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("ready after"):
                break
            if time.monotonic() - began > timeout_s:
                break
        found = [server for server in quire.find_servers() if server["pid"] == process.pid]
        if not found:
            raise RuntimeError("the server did not start:\n" + "\n".join(lines))
        while not _healthy(found[0]["url"]):
            if time.monotonic() - began > timeout_s or process.poll() is not None:
                raise RuntimeError("the server was never healthy:\n" + "\n".join(lines))
            time.sleep(0.01)
        yield {**found[0], "start_s": time.monotonic() - began, "lines": lines}
    finally:
        process.terminate()
        process.wait(60)


def _healthy(url: str) -> bool:
    """Does the server answer 200 on /health? A refused connection or 503 means: not yet."""
    try:
        with urllib.request.urlopen(url + "/health", timeout=30) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
