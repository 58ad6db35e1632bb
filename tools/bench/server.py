"""A server for the length of a measurement."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import quire


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
        with urllib.request.urlopen(found[0]["url"] + "/health", timeout=30) as answer:
            if answer.status != 200:
                raise RuntimeError(f"/health answered {answer.status}")
        yield {**found[0], "start_s": time.monotonic() - began, "lines": lines}
    finally:
        process.terminate()
        process.wait(60)
