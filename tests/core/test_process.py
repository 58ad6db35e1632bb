"""Process: heartbeats, the order to stop, and what an orphan leaves behind: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from core import process as module
from core.channel import Server
from core.config import Config
from core.messages import Heartbeat, Ready, Shutdown, StatsReply, ToSupervisor
from core.model_info import ModelInfo
from core.process import Process
from core.stats import TokenizerSnapshot, decode

WAIT_S = 10.0
MODEL = ModelInfo("/nowhere", "m", "1", "llama", ["LlamaForCausalLM"], 100, 64, [2])


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # short: a socket's path is limited
        path = Path(folder, "run")
        path.mkdir()
        (path / "config.json").write_bytes(Config(max_num_seqs=7).to_json())
        (path / "model.json").write_bytes(msgspec.json.encode(MODEL))
        yield path


@pytest.fixture
def supervisor(run_dir: Path) -> Iterator[Server[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    server: Server[Any] = Server(context, f"ipc://{run_dir}/control", ToSupervisor)
    yield server
    server.close()
    context.term()


@pytest.fixture
def process(run_dir: Path, supervisor: Server[Any]) -> Iterator[Process]:
    made = Process("tokenizer-3", run_dir, Config(), MODEL, os.getppid())
    yield made
    if not made.control.socket.closed:
        made.finish()


def received(server: Server[Any], timeout_s: float = 0.1) -> list[Any]:
    found = []
    while (frame := server.receive(timeout_s)) is not None:
        assert frame[0] == "tokenizer-3"
        found += frame[1]
    return found


def wait_for_control(process: Process) -> list[Shutdown | StatsReply]:
    assert process.control.socket.poll(int(WAIT_S * 1000))
    return process.poll_control()


def test_a_process_knows_its_place(process: Process, run_dir: Path) -> None:
    assert (process.name, process.index) == ("tokenizer-3", 3)
    assert process.address("scheduler") == f"ipc://{run_dir}/scheduler"
    assert not process.stopping
    assert not process.orphaned


def test_ready_tells_phases_and_facts(process: Process, supervisor: Server[Any]) -> None:
    process.ready("all well", {"load": 1.5}, {"blocks": 12})
    assert received(supervisor) == [Ready("tokenizer-3", os.getpid(), "all well", {"load": 1.5}, {"blocks": 12})]


def test_heartbeats_at_most_once_a_second(
    process: Process, supervisor: Server[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=500.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    for tick in range(50):  # 4.9 s in steps of 0.1 s
        clock.now = 500.0 + tick / 10
        due = process.control.due()
        assert due == (tick % 10 == 0)
        process.beat(TokenizerSnapshot(live=tick))
    beats = received(supervisor)
    assert [beat.sent_s for beat in beats] == pytest.approx([500.0, 501.0, 502.0, 503.0, 504.0])
    assert all(isinstance(beat, Heartbeat) and beat.pid == os.getpid() for beat in beats)
    assert [decode(beat.snapshot) for beat in beats] == [TokenizerSnapshot(live=n) for n in (0, 10, 20, 30, 40)]


def test_a_beat_without_figures_carries_none(process: Process, supervisor: Server[Any]) -> None:
    process.beat()
    (beat,) = received(supervisor)
    assert decode(beat.snapshot) is None


def test_shutdown_sets_stopping(process: Process, supervisor: Server[Any]) -> None:
    process.ready()
    received(supervisor)
    reply = StatsReply(1, "ready", {}, {})
    supervisor.send("tokenizer-3", [reply])
    assert wait_for_control(process) == [reply]
    assert not process.stopping
    supervisor.send("tokenizer-3", [Shutdown("enough")])
    assert wait_for_control(process) == [Shutdown("enough")]
    assert process.stopping
    assert process.poll_control() == []


def test_a_supervised_process_leaves_the_run_folder(process: Process, run_dir: Path) -> None:
    process.finish()
    assert run_dir.is_dir()


def test_an_orphan_removes_the_run_folder(run_dir: Path) -> None:
    orphan = Process("api-0", run_dir, Config(), MODEL, parent_pid=os.getppid() + 1)
    assert orphan.orphaned
    orphan.finish()
    assert not run_dir.exists()


CHILD = """
import time
from core.process import Process

process = Process.start("scheduler")
print(process.name, process.config.max_num_seqs, process.model.engine, flush=True)
while not process.stopping:
    time.sleep(0.02)
print("stopping", flush=True)
time.sleep(60)  # deep in a long step: only the signal's handler can end it
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], "--run-dir", sys.argv[2], "--name", "scheduler"])
print(child.pid, flush=True)
child.wait()
"""


@pytest.fixture
def family(run_dir: Path) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A supervisor in a process of its own, with one child that has begun."""
    command = [sys.executable, "-c", PARENT, CHILD, str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline() == "scheduler 7 m@1\n"
        yield parent, child
        for each in (child, psutil.Process(parent.pid) if parent.poll() is None else child):
            if each.is_running():
                each.kill()


def wait_gone(process: psutil.Process) -> None:
    deadline = time.monotonic() + WAIT_S
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the orphan lives on"
        time.sleep(0.02)


def test_the_kernel_ends_an_orphan(family: tuple[subprocess.Popen[str], psutil.Process], run_dir: Path) -> None:
    parent, child = family
    parent.kill()
    wait_gone(child)
    assert not run_dir.exists()


def test_signals_do_not_end_a_supervised_child(family: tuple[subprocess.Popen[str], psutil.Process]) -> None:
    parent, child = family
    assert child.cmdline()[0].startswith("quire: scheduler")
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "stopping\n"  # it goes in its own time
    assert child.is_running()


def test_a_child_of_a_dead_supervisor_does_not_begin(run_dir: Path) -> None:
    command = [sys.executable, "-c", CHILD, "--run-dir", str(run_dir), "--name", "scheduler", "--parent", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")


def test_the_configuration_comes_from_a_descriptor_where_there_is_one(run_dir: Path) -> None:
    fd = os.memfd_create("config")
    os.write(fd, Config(api_key=("sk-1",)).to_json())
    os.lseek(fd, 0, os.SEEK_SET)
    code = "from core.process import Process; print(*Process.start('api').config.api_key)"
    command = [sys.executable, "-P", "-c", code, "--run-dir", str(run_dir), "--name", "api-0"]
    told = subprocess.run(
        [*command, "--config-fd", str(fd)], pass_fds=[fd], capture_output=True, text=True, check=True, timeout=30
    )
    os.close(fd)
    assert told.stdout == "sk-1\n"
