"""Limits, folders, port and hub: what a machine may lack."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest

from core.config import Config
from tools.doctor import system

GIB = 2**30


def disk(free: int) -> Any:
    return lambda path: shutil._ntuple_diskusage(100 * GIB, 100 * GIB - free, free)


def test_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, status in ((2, "warning"), (4, "ok")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, count=count: set(range(count)))
        assert system.processors().status == status


@pytest.mark.parametrize(
    ("soft", "hard", "workers", "status", "fix"),
    [
        (20000, 20000, 1, "ok", ""),
        (-1, -1, 1, "ok", ""),
        (1024, -1, 1, "warning", "ulimit -n 4352"),
        (1024, 4096, 1, "warning", "raise the hard limit of 4,096"),
        (1024, 1024, 8, "ok", ""),
        (256, -1, 1, "problem", "ulimit -n 4352"),
    ],
)
def test_open_files(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, workers: int, status: str, fix: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    found = system.open_files(Config(api_workers=workers))
    assert found.status == status
    assert fix in found.fix


@pytest.mark.parametrize(
    ("free", "ranks", "status"),
    [(64 * 2**20, 1, "ok"), (32 * 2**20, 1, "warning"), (64 * 2**20, 2, "problem"), (8 * GIB, 2, "ok")],
)
def test_shared_memory(monkeypatch: pytest.MonkeyPatch, free: int, ranks: int, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", disk(free))
    found = system.shared_memory(Config(tensor_parallel_size=ranks))
    assert found.status == status
    assert status == "ok" or "--shm-size" in found.fix


def test_no_shared_memory(tmp_path: Path) -> None:
    assert system.shared_memory(Config(), tmp_path / "none").status == "warning"


def test_a_taken_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        found = system.port(Config(port=number))
        assert (found.status, found.fix) == ("problem", "choose another --port or --host")
        assert f"cannot listen on 127.0.0.1:{number}: Address already in use" in found.text
        server = {"url": f"http://127.0.0.1:{number}", "pid": 7, "model": "m"}
        monkeypatch.setattr("quire.find_servers", lambda: [server])
        assert "taken by Quire (pid 7, m)" in system.port(Config(port=number)).text
    assert system.port(Config(port=number)).status == "ok"
    assert system.port(Config(port=0)).status == "ok"


def test_the_kernel_cache_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = Config(cache_dir=str(tmp_path / "deep" / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", disk(50 * GIB))
    assert [finding.status for finding in system.kernel_cache(config)] == ["ok", "ok"]
    assert list((tmp_path / "deep" / "cache").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", disk(GIB // 2))
    assert [finding.status for finding in system.kernel_cache(config)] == ["ok", "warning"]
    monkeypatch.setattr(shutil, "disk_usage", disk(GIB // 100))
    assert system.kernel_cache(config)[1].status == "problem"
    (tmp_path / "file").touch()
    (found,) = system.kernel_cache(Config(cache_dir=str(tmp_path / "file")))
    assert (found.name, found.status) == ("kernel cache", "problem")
    assert "--cache-dir" in found.fix


def test_downloads_count_for_models_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "not" / "made"))
    monkeypatch.setattr(shutil, "disk_usage", disk(5 * GIB))
    assert system.download_folder(Config(model="owner/name")).status == "warning"
    for model in ("tiny-chat", str(tmp_path)):
        assert system.download_folder(Config(model=model)).status == "skipped"


def test_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert system.sockets(Config()).status == "ok"
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    found = system.sockets(Config())
    assert (found.status, found.fix) == ("problem", "set TMPDIR to a short path")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert system.sockets(Config()).status == "problem"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"quire-{os.getuid()}").chmod(0o755)
    assert "mode 0700" in system.sockets(Config()).text


def test_offline_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(system, "_unreachable", lambda url: pytest.fail("asked"))
    assert system.hub_access(Config()).status == "skipped"
    assert system.hub_access(Config(model="owner/name")).status == "problem"
    (tmp_path / "models--owner--name").mkdir()
    assert system.hub_access(Config(model="owner/name")).status == "skipped"


class Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(503)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        assert system.hub_access(Config()).status == "ok"  # any answer is one
        thread.join()
    found = system.hub_access(Config())
    assert found.status == "warning"
    assert "Connection refused" in found.text
    assert system.hub_access(Config(model="owner/name")).status == "problem"
    monkeypatch.setattr(hub, "ENDPOINT", "no address")
    assert system.hub_access(Config()).status == "warning"
