"""Process: how a child process of the server begins, tells that it lives, and ends.

The supervisor starts children as `python -P -m <module> --run-dir DIR --name NAME`. A child takes its title, asks the
kernel to be told when the supervisor dies, loads the configuration, and reports Ready and Heartbeats on "control".
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import setproctitle
import zmq

from core.channel import ChannelFull, Client
from core.config import Config
from core.messages import FromSupervisor, Heartbeat, Ready, Shutdown, StatsReply
from core.model_info import ModelInfo

HEARTBEAT_S = 1.0
_PR_SET_PDEATHSIG = 1


def freeze_heap() -> None:
    """Take what start-up made out of the garbage collector's sight: a collection in a hot loop then stays short."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)  # the loops make no cycles; the default would look for some every few steps


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel send SIGTERM when the parent dies (Linux); exits at once when it is dead already."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent_pid:
        raise SystemExit(1)


class Control:
    """The line to the supervisor. Statistics ride on heartbeats, which the owner's own loop must call for."""

    def __init__(self, context: zmq.Context[Any], address: str, name: str) -> None:
        self.name = name
        self._client: Client[Shutdown | StatsReply] = Client(context, address, FromSupervisor, name=name)
        self.socket = self._client.socket
        self._next_s = 0.0

    def ready(
        self,
        detail: str = "",
        phases: dict[str, float] | None = None,
        facts: dict[str, str | int | float] | None = None,
    ) -> None:
        """This process can do its work."""
        self.send(Ready(self.name, os.getpid(), detail, phases or {}, facts or {}))

    def due(self) -> bool:
        """Whether it is time for a heartbeat; asked before a snapshot is made."""
        return time.monotonic() >= self._next_s

    def beat(self, snapshot: Any = None) -> None:
        """Send a heartbeat if one is due."""
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + HEARTBEAT_S
        payload = b"" if snapshot is None else msgspec.msgpack.encode(snapshot)
        self.send(Heartbeat(self.name, os.getpid(), now, payload))

    def send(self, message: Any) -> None:
        """Queue a message. A supervisor that does not read is about to be gone: then so are we."""
        try:
            self._client.send([message])
        except ChannelFull:
            raise SystemExit(1) from None

    def poll(self) -> list[Shutdown | StatsReply]:
        """What the supervisor has sent, without waiting."""
        news: list[Shutdown | StatsReply] = []
        while (frame := self._client.receive(0)) is not None:
            news += frame
        return news

    def close(self) -> None:
        self._client.close()


class Process:
    """What a child knows of itself. `stopping` turns true at Shutdown, or when the supervisor is gone."""

    def __init__(self, name: str, run_dir: Path, config: Config, model: ModelInfo, parent_pid: int) -> None:
        self.name = name
        self.index = int(name.rpartition("-")[2]) if "-" in name else 0
        self.run_dir = run_dir
        self.config = config
        self.model = model
        self.stopping = False
        self._parent_pid = parent_pid
        self._context: zmq.Context[Any] = zmq.Context()
        self.control = Control(self._context, self.address("control"), name)

    @staticmethod
    def start(role: str, argv: list[str] | None = None) -> Process:
        """Begin as a child of the supervisor; `role` is the first word of the title."""
        parent_pid = os.getppid()
        arguments = _parse(role, argv)
        die_with_parent(arguments.parent or parent_pid)
        run_dir = Path(arguments.run_dir)
        setproctitle.setproctitle("quire: " + arguments.name.replace("-", " "))
        process = Process(
            arguments.name,
            run_dir,
            _config(arguments.config_fd, run_dir),
            msgspec.json.decode((run_dir / "model.json").read_bytes(), type=ModelInfo),
            arguments.parent or parent_pid,
        )
        # A terminal's Ctrl-C reaches the whole group; only the supervisor decides the order of the end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, process._terminated)
        return process

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        if self.orphaned:
            # Nobody is left to tidy up, and this process may be deep in a long step: leave now.
            self.remove_run_dir()
            os._exit(1)

    @property
    def orphaned(self) -> bool:
        """Whether the supervisor is dead."""
        return os.getppid() != self._parent_pid

    def remove_run_dir(self) -> None:
        """Remove sockets and files; done by every orphan, so that the last one leaves nothing."""
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def address(self, socket: str) -> str:
        """The ipc address of a socket in the run folder."""
        return f"ipc://{self.run_dir}/{socket}"

    def ready(
        self,
        detail: str = "",
        phases: dict[str, float] | None = None,
        facts: dict[str, str | int | float] | None = None,
    ) -> None:
        """Report that this process can do its work."""
        self.control.ready(detail, phases, facts)

    def beat(self, snapshot: Any = None) -> None:
        """Heartbeat, at most once a second."""
        self.control.beat(snapshot)

    def poll_control(self) -> list[Shutdown | StatsReply]:
        """Take what the supervisor has sent; a Shutdown sets `stopping`."""
        news = self.control.poll()
        if any(isinstance(message, Shutdown) for message in news):
            self.stopping = True
        return news

    def finish(self) -> None:
        """Close the line to the supervisor; an orphan also tidies up."""
        self.control.close()
        self._context.term()
        if self.orphaned:
            self.remove_run_dir()


def _config(fd: int | None, run_dir: Path) -> Config:
    """From the supervisor's memory where it gave a descriptor, else the file, which has no secrets."""
    if fd is None:
        return Config.from_json((run_dir / "config.json").read_bytes())
    with open(fd, "rb") as file:
        return Config.from_json(file.read())


def _parse(role: str, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"quire {role}", description="A child process of quire serve.")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--parent", type=int, default=None, help="pid of the supervisor")
    parser.add_argument("--fd", type=int, default=None, help="listening socket (api)")
    parser.add_argument("--config-fd", type=int, default=None, help="the configuration with its secrets (api)")
    return parser.parse_args(argv)
