"""Supervisor over tiny children: order of start and stop, restarts and their limit, failures that end the server.

The children are one small module that begins as the real ones do (core.process) and then does what its plan says.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from core.channel import Client
from core.config import Config
from core.messages import FromSupervisor, StatsQuery, StatsReply
from core.model_info import ModelInfo
from core.stats import TokenizerSnapshot, decode
from tools import supervisor as module
from tools.run_dir import RunDir
from tools.supervisor import Supervisor

WAIT_S = 30.0
MODEL = ModelInfo("/nowhere", "m", "1", "llama", ["LlamaForCausalLM"], 100, 64, [2])
CHILD = """
import json, os, sys, time
from core.process import Process
from core.stats import TokenizerSnapshot

name = sys.argv[sys.argv.index("--name") + 1]
plan = json.loads(os.environ["PLAN"]).get(name, "")
log = open(os.environ["LOG"], "a", buffering=1)  # lines of several processes stay whole

if plan == "fail":
    sys.exit(7)
if plan == "slow":
    time.sleep(3600)  # loads a large model
process = Process.start(name.partition("-")[0])
first = not any(line == f"ready {name}\\n" for line in open(os.environ["LOG"]))
if process.config.secrets():
    print("configured-secret", name, file=log)
if "QUIRE_API_KEY" in os.environ:
    print("inherited-secret", name, file=log)
process.ready("fine", facts={f"fact.{name}": 1})
process.beat(TokenizerSnapshot(live=5))
print("ready", name, file=log)
while not process.stopping or plan == "deaf":
    process.poll_control()
    if plan != "silent":
        process.beat()
    if os.path.exists(os.environ["LOG"] + ".serving") and (plan == "die" or (plan == "die once" and first)):
        os._exit(9)
    time.sleep(0.01)
print("stop", name, file=log)
process.finish()
"""


class Stage:
    """One supervisor with planned children. `run` returns its exit code."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = folder / "log"
        self.log.touch()
        self.said: list[str] = []
        self.told_ready = 0
        self._monkeypatch = monkeypatch
        (folder / "planned_child.py").write_text(CHILD)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setenv("LOG", str(self.log))
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        monkeypatch.setattr(module, "MODULES", dict.fromkeys(module.MODULES, "planned_child"))

    def lines(self, word: str) -> list[str]:
        """Names in the order in which they were `word` ("ready", "stop")."""
        return [line.split()[1] for line in self.log.read_text().splitlines() if line.startswith(word + " ")]

    def run(self, plan: dict[str, str], then: Callable[[Supervisor], object] | None = None, **config: Any) -> int:
        """Until it fails, or `then` (in a thread of its own, from readiness on) returns and SIGTERM is sent."""
        self._monkeypatch.setenv("PLAN", json.dumps(plan))
        supervisor = Supervisor(Config(drain_timeout_s=0.2, **config), MODEL, RunDir("t"), None, self.said.append)
        thread: list[threading.Thread] = []
        failures: list[BaseException] = []

        def act() -> None:
            try:
                assert then is not None
                then(supervisor)
            except BaseException as error:
                failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

        def ready() -> None:
            self.told_ready += 1
            self.log.with_name("log.serving").touch()  # from now on children may die
            if then is not None:
                thread.append(threading.Thread(target=act))
                thread[0].start()

        code = supervisor.run(ready)
        for each in thread:
            each.join()
        assert not failures, failures
        assert all(child.process.returncode is not None for child in supervisor.children.values())
        assert not supervisor.run_dir.path.exists()
        return code


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with tempfile.TemporaryDirectory() as folder:  # short: a socket's path is limited
        yield Stage(Path(folder), monkeypatch)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_start_and_orderly_stop(stage: Stage) -> None:
    before = signal.getsignal(signal.SIGTERM)
    code = stage.run({}, lambda _: None, tensor_parallel_size=2, tokenizer_workers=2)
    assert code == 0
    assert stage.told_ready == 1
    assert set(stage.lines("ready")) == {"worker-0", "worker-1", "scheduler", "tokenizer-0", "tokenizer-1", "api-0"}
    assert [name.partition("-")[0] for name in stage.lines("stop")] == [
        *["api", "tokenizer", "tokenizer", "scheduler"],
        *["worker", "worker"],
    ]
    assert any(line.startswith("  scheduler    ready after") and line.endswith("fine") for line in stage.said)
    assert signal.getsignal(signal.SIGTERM) is before


def test_secrets_reach_api_processes_only(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_API_KEY", "sk-1")

    def look(supervisor: Supervisor) -> None:
        files = [path.read_text() for path in supervisor.run_dir.path.iterdir() if path.is_file()]
        assert any('"api_key"' in content for content in files)
        assert not any("sk-1" in content for content in files)
        supervisor.children["api-0"].process.kill()
        until(lambda: stage.lines("ready").count("api-0") == 2)

    assert stage.run({}, look, api_key=("sk-1",)) == 0
    assert stage.lines("configured-secret") == ["api-0", "api-0"]  # also the one that was started again
    assert stage.lines("inherited-secret") == []


def test_stats_queries_are_answered_with_everybodys_snapshots(stage: Stage) -> None:
    replies: list[StatsReply] = []

    def ask(supervisor: Supervisor) -> None:
        context: zmq.Context[Any] = zmq.Context()
        address = f"ipc://{supervisor.run_dir.path}/control"
        client: Client[StatsReply] = Client(context, address, FromSupervisor, name="asker")
        client.send([StatsQuery(17)])
        replies.extend(client.receive(WAIT_S) or [])
        client.close()
        context.term()

    assert stage.run({}, ask) == 0
    (reply,) = replies
    assert (reply.query_id, reply.state) == (17, "ready")
    names = {"worker-0", "scheduler", "tokenizer-0", "api-0"}
    assert {name: decode(payload) for name, payload in reply.snapshots.items() if name in names} == {
        name: TokenizerSnapshot(live=5) for name in names
    }
    assert reply.server["pid.supervisor"] == os.getpid()
    assert reply.server["restarts"] == 0
    assert {f"pid.{name}" for name in names} | {f"fact.{name}" for name in names} <= reply.server.keys()


@pytest.mark.parametrize("name", ["worker-0", "tokenizer-0"])
def test_a_child_that_fails_at_start_stops_everybody(stage: Stage, name: str) -> None:
    assert stage.run({name: "fail"}) == 1
    assert stage.said[-1] == f"error: {name} ended with code 7 before the server was ready"
    assert stage.told_ready == 0


def test_an_api_process_comes_back_alone(stage: Stage) -> None:
    code = stage.run({"api-0": "die once"}, lambda _: until(lambda: stage.lines("ready").count("api-0") == 2))
    assert code == 0
    assert "api-0 ended (code 9); starting api-0 again" in stage.said
    assert sorted(stage.lines("ready")) == ["api-0", "api-0", "scheduler", "tokenizer-0", "worker-0"]


def test_workers_come_back_together(stage: Stage) -> None:
    ranks = ("worker-0", "worker-1")
    code = stage.run(
        {"worker-1": "die once"},
        lambda _: until(lambda: all(stage.lines("ready").count(rank) == 2 for rank in ranks)),
        tensor_parallel_size=2,
    )
    assert code == 0
    assert "worker-1 ended (code 9); starting worker-0, worker-1 again" in stage.said
    assert stage.lines("ready").count("scheduler") == 1


def test_restarts_are_limited(stage: Stage) -> None:
    code = stage.run({"worker-0": "die"}, lambda supervisor: until(lambda: supervisor.state == "failed"))
    assert code == 1
    assert stage.lines("ready").count("worker-0") == 1 + 3
    window = "3 restarts within 120 s"
    assert f"error: worker-0 ended again (code 9) after {window}; the server is not ready until restarted" in stage.said
    assert stage.lines("stop") == ["api-0"], "the others are ended at once, the api process at the signal"


def test_old_restarts_are_forgiven(stage: Stage) -> None:
    def thrice(_: Supervisor) -> None:
        until(lambda: stage.lines("ready").count("api-0") >= 3)

    assert stage.run({"api-0": "die"}, thrice, max_restarts=1, restart_window_s=1e-6) == 0


@pytest.mark.parametrize("name", ["scheduler", "tokenizer-0"])
def test_scheduler_and_tokenizer_come_back_alone(stage: Stage, name: str) -> None:
    lives: list[object] = []

    def back(supervisor: Supervisor) -> None:
        until(lambda: supervisor.children[name].served == 2)
        lives.extend(supervisor._server_facts()[f"life.{each}"] for each in (name, "worker-0"))

    assert stage.run({name: "die once"}, back) == 0
    assert lives == [2, 1]
    assert f"{name} ended (code 9); starting {name} again" in stage.said


def test_a_scheduler_takes_ranks_that_share_a_step_with_it(stage: Stage) -> None:
    def back(_: Supervisor) -> None:
        until(lambda: all(stage.lines("ready").count(rank) == 2 for rank in ("worker-0", "worker-1")))

    assert stage.run({"scheduler": "die once"}, back, tensor_parallel_size=2) == 0


def test_a_killed_child_is_told_by_its_signal(stage: Stage) -> None:
    def kill(supervisor: Supervisor) -> None:
        supervisor.children["scheduler"].process.kill()
        until(lambda: supervisor.children["scheduler"].served == 2)

    assert stage.run({}, kill) == 0
    assert "scheduler ended (signal 9); starting scheduler again" in stage.said


def test_a_silent_child_is_killed_and_replaced(stage: Stage) -> None:
    plan = {"api-0": "silent"}
    then = lambda _: until(lambda: stage.lines("ready").count("api-0") == 2)  # noqa: E731
    assert stage.run(plan, then, hang_timeout_s=2.0) == 0
    assert "api-0 has been silent for 2 s; it is killed" in stage.said
    assert "api-0 ended (signal 9); starting api-0 again" in stage.said


def test_a_deaf_child_is_killed_in_the_end(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KILL_AFTER_S", 0.3)
    assert stage.run({"tokenizer-0": "deaf"}, lambda _: None) == 0
    assert stage.lines("stop") == ["api-0", "scheduler", "worker-0"]


def test_a_signal_while_starting_waits_for_no_answers(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KILL_AFTER_S", 3600.0)  # the test's own limit would end it

    def interrupt() -> None:
        until(lambda: len(stage.lines("ready")) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert stage.run({"api-0": "slow", "worker-0": "slow"}) == 0
    thread.join()
    assert stage.told_ready == 0
    assert stage.lines("stop") == ["tokenizer-0", "scheduler"]
