"""Stamp: what a figure was measured with. Every table is printed under one."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("torch", "triton", "transformers")


def stamp(name: str, argv: Sequence[str]) -> dict[str, Any]:
    """The command, the date, the versions and the machine."""
    return {
        "command": " ".join(["quire bench", name, *argv]),
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "versions": _versions(),
        "machine": _machine(),
        "load_average": round(psutil.getloadavg()[0], 2),
    }


def lines(stamped: dict[str, Any]) -> str:
    """A stamp in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in stamped["versions"].items())
    return (
        f"`{stamped['command']}`  \n{stamped['date']}; {stamped['machine']}; {versions}; "
        f"load average at the start {stamped['load_average']}"
    )


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in ("quire", *_PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"):
        found["quire"] = f"{found.get('quire', '')} ({commit})"
    return found


def _machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        info = Path("/proc/cpuinfo").read_text()
        model = next(line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gib = psutil.virtual_memory().total / 2**30
    gpus = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    devices = f", {len(gpus)} x {gpus[0]}" if gpus else ""
    return f"{psutil.cpu_count()} cores of {model}, {gib:.0f} GiB{devices}"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
