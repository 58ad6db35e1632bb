"""Supervisor: starts a server's processes, waits for each, watches heartbeats, restarts what may be, ends in order.

It also answers everybody's StatsQuery with the latest snapshots. Workers and the scheduler start together (workers are
the slowest), then tokenizers; api processes come with them and answer "loading" until all are ready.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import msgspec
import zmq

from core.channel import ChannelFull, PeerGone, Server
from core.config import Config, without_secrets
from core.messages import Heartbeat, Ready, Shutdown, StatsQuery, StatsReply, ToSupervisor
from core.model_info import ModelInfo
from core.stats import SupervisorSnapshot
from tools.machine import Machine
from tools.run_dir import RunDir

POLL_S = 0.05
START_S = 600.0  # a process that is not ready after so long hangs: a large model takes minutes
BACK_OFF_S = 0.25  # before a second restart in the window; doubled with each one more
KILL_AFTER_S = 5.0
MODULES = {
    "worker": "models.runtime.worker",
    "scheduler": "core.engine",
    "tokenizer": "core.tokenizer",
    "api": "api.server",
}
STOP_ORDER = ("api", "tokenizer", "scheduler", "worker")


class StartFailed(Exception):
    """A process ended, or hung, before the server was ready."""


@dataclass
class Child:
    """One process. `restarts` are the times at which it was started again."""

    name: str
    process: subprocess.Popen[bytes]
    ready: Ready | None = None
    snapshot: bytes = b""
    heard_s: float = field(default_factory=time.monotonic)
    restarts: deque[float] = field(default_factory=deque)
    life: int = 1
    served: int = 0  # the last life in which it became ready
    due_s: float | None = None  # dead: when it is started again

    @property
    def role(self) -> str:
        return self.name.partition("-")[0]


class Supervisor:
    """Owns the children of one server. `run` returns the exit code."""

    def __init__(
        self, config: Config, model: ModelInfo, run_dir: RunDir, http_fd: int | None, say: Callable[[str], None]
    ) -> None:
        self.config = config
        self.model = model
        self.run_dir = run_dir
        self.http_fd = http_fd
        self.say = say
        self.state = "loading"
        self.children: dict[str, Child] = {}
        self.facts: dict[str, str | int | float] = {}
        self.machine = Machine()
        self.began_s = time.monotonic()
        self._signals = 0
        self._context: zmq.Context[Any] = zmq.Context()
        self._server: Server[ToSupervisor] = Server(self._context, f"ipc://{run_dir.path}/control", ToSupervisor)

    # ------------------------------------------------------------------------------------------ the whole life

    def run(self, on_ready: Callable[[], None]) -> int:
        """Start everything, call `on_ready`, watch until a signal or a failure, end everything."""
        old = {number: signal.signal(number, self._signalled) for number in (signal.SIGTERM, signal.SIGINT)}
        code = 0
        try:
            self._start_all()
            self._wait_ready()
            if not self._signals:
                self.state = "ready"
                on_ready()
            while not self._signals:
                self._listen(POLL_S)
                self._watch()
            code = int(self.state == "failed")
        except StartFailed as failure:
            self.say(f"error: {failure}")
            self.state = "failed"
            code = 1
        finally:
            drain = self.state == "ready"  # a start that is given up has no answers to finish
            if code == 0:
                self.state = "draining"
            self.stop(drain)
            self._server.close()
            self._context.term()
            self.run_dir.remove()
            for number, handler in old.items():
                signal.signal(number, handler)
        return code

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    # ------------------------------------------------------------------------------------------ start

    def _start_all(self) -> None:
        self.run_dir.write("config.json", self.config.without_secrets().to_json())
        self.run_dir.write("model.json", msgspec.json.encode(self.model))
        for rank in range(self.config.tensor_parallel_size):
            self._start(f"worker-{rank}")
        self._start("scheduler")
        for index in range(self.config.tokenizer_workers):
            self._start(f"tokenizer-{index}")
        for index in range(self.config.api_workers if self.http_fd is not None else 1):
            self._start(f"api-{index}")

    def _start(self, name: str) -> None:
        role = name.partition("-")[0]
        command = [sys.executable, "-P", "-m", MODULES[role], "--run-dir", str(self.run_dir.path), "--name", name]
        command += ["--parent", str(os.getpid())]
        fds: list[int] = []
        if role == "api":
            fds = [self._config_fd()]
            command += ["--config-fd", str(fds[0])]
            if self.http_fd is not None:
                fds.append(self.http_fd)
                command += ["--fd", str(self.http_fd)]
        # A group of their own: a terminal's Ctrl-C reaches the supervisor only, which ends the others in order.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=fds, process_group=0, env=without_secrets(os.environ)
        )
        if role == "api":
            os.close(fds[0])
        old = self.children.get(name)
        if old is None:
            self.children[name] = Child(name, process)
        else:
            self.children[name] = Child(
                name, process, restarts=old.restarts, life=old.life + 1, served=old.served, snapshot=old.snapshot
            )

    def _config_fd(self) -> int:
        """The whole configuration as a file in memory: only api processes need its secrets, and no disk sees them."""
        fd = os.memfd_create("quire-config")
        os.write(fd, self.config.to_json())
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def _wait_ready(self) -> None:
        """Until every child is ready, or a signal comes."""
        began = time.monotonic()
        told: set[str] = set()
        while not self._signals:
            self._listen(POLL_S)
            for child in self.children.values():
                if child.ready is not None and child.name not in told:
                    told.add(child.name)
                    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in child.ready.phases.items())
                    self.say(
                        f"  {child.name:<12} ready after {time.monotonic() - began:4.1f} s  "
                        + "; ".join(part for part in (child.ready.detail, phases) if part)
                    )
                elif child.process.poll() is not None:
                    code = child.process.returncode
                    raise StartFailed(f"{child.name} ended with code {code} before the server was ready")
            if len(told) == len(self.children):
                return

    # ------------------------------------------------------------------------------------------ listen and watch

    def _listen(self, timeout_s: float) -> None:
        """Take messages for at most `timeout_s`."""
        frame = self._server.receive(timeout_s)
        while frame is not None:
            peer, messages = frame
            for message in messages:
                self._take(peer, message)
            frame = self._server.receive(0)

    def _take(self, peer: str, message: Ready | Heartbeat | StatsQuery) -> None:
        child = self.children.get(peer)
        if child is not None:
            child.heard_s = time.monotonic()
        match message:
            case Ready() if child is not None and message.pid == child.process.pid and child.due_s is None:
                child.ready = message
                child.served = child.life
                self.facts.update(message.facts)
                self._tell_apis()
            case Heartbeat() if child is not None and message.pid == child.process.pid:
                child.snapshot = message.snapshot or child.snapshot
            case StatsQuery(query_id):
                self._send(peer, StatsReply(query_id, self._public_state(), self._snapshots(), self._server_facts()))
            case _:
                pass  # the last words of a process that has been replaced

    def _public_state(self) -> str:
        whole = all(child.ready is not None for child in self.children.values())
        return "loading" if self.state == "ready" and not whole else self.state

    def _snapshots(self) -> dict[str, bytes]:
        found = {child.name: child.snapshot for child in self.children.values() if child.snapshot}
        pids = {"supervisor": os.getpid(), **{child.name: child.process.pid for child in self.children.values()}}
        restarts = {child.name: len(child.restarts) for child in self.children.values()}
        own = SupervisorSnapshot(
            model=self.model.name,
            uptime_s=time.monotonic() - self.began_s,
            processes=self.machine.processes(pids, restarts),
            num_devices=self.config.tensor_parallel_size,
            gpu_price_per_hour=self.config.gpu_price_per_hour,
        )
        return {**found, "supervisor": msgspec.msgpack.encode(own)}

    def _server_facts(self) -> dict[str, str | int | float]:
        pids: dict[str, str | int | float] = {f"pid.{c.name}": c.process.pid for c in self.children.values()}
        restarts = sum(len(child.restarts) for child in self.children.values())
        lives = {f"life.{c.name}": c.served for c in self.children.values() if c.served}
        return {"pid.supervisor": os.getpid(), "restarts": restarts, **self.facts, **pids, **lives}

    def _tell_apis(self) -> None:
        """Say at once what has changed; they would ask within a second."""
        reply = StatsReply(0, self._public_state(), self._snapshots(), self._server_facts())
        for child in self.children.values():
            if child.role == "api" and child.ready is not None:
                self._send(child.name, reply)

    def _send(self, peer: str, message: Any) -> None:
        with contextlib.suppress(PeerGone, ChannelFull):  # its death is seen by _watch
            self._server.send(peer, [message])

    def _watch(self) -> None:
        """Notice what died or hangs; start again what has waited long enough."""
        now = time.monotonic()
        for child in list(self.children.values()):
            if self.children[child.name] is not child:
                continue  # replaced together with its group
            if child.due_s is not None:
                if now >= child.due_s:
                    self._start(child.name)
                continue
            silent = now - child.heard_s
            if child.process.poll() is None:
                if silent < self._patience_s(child):
                    continue
                self.say(f"{child.name} has been silent for {silent:.0f} s; it is killed")
                child.process.kill()
                child.process.wait()
            if self.state == "ready" or child.role == "api":
                self._replace(child)

    def _patience_s(self, child: Child) -> float:
        if child.ready is None:
            return START_S
        return self.config.worker_hang_timeout_s if child.role == "worker" else self.config.hang_timeout_s

    def _replace(self, dead: Child) -> None:
        """Start again, with back-off, what died, and with a worker all of its partners. Too often: give up."""
        code = dead.process.returncode
        reason = f"signal {-code}" if code < 0 else f"code {code}"
        now = time.monotonic()
        while dead.restarts and now - dead.restarts[0] > self.config.restart_window_s:
            dead.restarts.popleft()
        if len(dead.restarts) >= self.config.max_restarts:
            self._give_up(dead, reason)
            return
        back_off_s = BACK_OFF_S * 2 ** (len(dead.restarts) - 1) if dead.restarts else 0.0
        dead.restarts.append(now)
        group = [dead]
        ranks = [child for child in self.children.values() if child.role == "worker"]
        if dead.role == "worker":
            group = ranks
        elif dead.role == "scheduler" and len(ranks) > 1:
            # It may have died between two ranks of one step: they would wait for each other for ever.
            group = [dead, *ranks]
        self.say(f"{dead.name} ended ({reason}); starting {', '.join(child.name for child in group)} again")
        for child in group:
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()
            child.ready = None
            child.due_s = now + back_off_s
        self._tell_apis()

    def _give_up(self, dead: Child, reason: str) -> None:
        """No crash loop: the engine ends, the api processes stay and say why."""
        window = f"{self.config.max_restarts} restarts within {self.config.restart_window_s:.0f} s"
        self.say(f"error: {dead.name} ended again ({reason}) after {window}; the server is not ready until restarted")
        self.state = "failed"
        dead.due_s = float("inf")
        for child in self.children.values():
            if child.role != "api":
                child.due_s = float("inf")
                if child.process.poll() is None:
                    child.process.kill()
                    child.process.wait()
        self._tell_apis()

    # ------------------------------------------------------------------------------------------ stop

    def stop(self, drain: bool) -> None:
        """End in order: api (running answers may finish), tokenizers, scheduler, workers."""
        before = self._signals
        for role in STOP_ORDER:
            group = [child for child in self.children.values() if child.role == role]
            for child in group:
                if child.process.poll() is None:
                    self._send(child.name, Shutdown("the server stops"))
            limit = (self.config.drain_timeout_s if role == "api" and drain else 0.0) + KILL_AFTER_S
            deadline = time.monotonic() + limit
            while any(child.process.poll() is None for child in group) and time.monotonic() < deadline:
                self._listen(0.02)
                if self._signals > max(before, 1):
                    break  # a second signal: now
                if any(child.ready is None for child in group) and not drain:
                    break  # still starting: it does not listen yet
            for child in group:
                if child.process.poll() is None:
                    child.process.kill()
                child.process.wait()
