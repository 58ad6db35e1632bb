"""The api process: both doors on one event loop. Never imports torch.

`python -P -m api.server --run-dir DIR --name api-I [--fd N]`: N is an inherited listening socket, the same for all api
processes; without one there is no HTTP. api-0 also binds the ZeroMQ door.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import logging
import os
import socket
import time
from typing import Any

import uvloop
import zmq

from api.app import make_app
from api.engine_client import EngineClient
from api.figures import SupervisorFigures
from api.http_server import HttpServer
from api.keys import Keys
from api.served import ServedModel
from api.service import Service
from api.tls import server_context
from api.zmq_server import ZmqServer
from core.admission import Bounds
from core.channel import Client
from core.errors import QuireError
from core.messages import FromTokenizer, StatsReply
from core.model_info import ModelInfo
from core.process import Process, freeze_heap
from core.sampling import SamplingLimits

log = logging.getLogger("quire.api")


def served_model(model: ModelInfo, name: str) -> ServedModel:
    """What the doors need of a model."""
    return ServedModel(
        name=name,
        engine=model.engine,
        created=int(time.time()),
        limits=SamplingLimits(vocab_size=model.vocab_size, max_model_len=model.max_model_len),
        defaults=model.sampling,
    )


async def serve(process: Process, listening: socket.socket | None) -> None:
    """Answer until the supervisor asks for the end; running answers may finish within drain_timeout_s."""
    config = process.config
    keys = Keys(config.api_key, config.api_key_file)
    try:
        keys.load()
    except QuireError as error:
        # It was well when the server started. A process that is started again must not fail for it.
        log.error("%s; nobody enters by it", error.message)
    context: zmq.Context[Any] = zmq.Context()
    links: list[Client[FromTokenizer]] = [
        Client(context, process.address(f"tokenizer-{index}"), FromTokenizer, name=process.name)
        for index in range(config.tokenizer_workers)
    ]
    engine = EngineClient(
        links,
        process.model.engine,
        f"{process.name}.{os.urandom(4).hex()}.",
        max_live=2 * (config.max_num_seqs + config.max_queued_requests),
        bounds=Bounds.of(config),
    )
    figures = SupervisorFigures(process, engine.snapshot, lambda: stop(), lambda reply: _noted(engine, reply))
    service = Service(
        engine=engine,
        model=served_model(process.model, config.served_model_name or process.model.name),
        figures=figures,
        version=importlib.metadata.version("quire"),
        max_body_bytes=config.max_body_bytes,
        strict_fields=config.strict_fields,
    )
    stopped = asyncio.Event()

    def stop() -> None:
        engine.draining = True
        http.should_exit = True
        stopped.set()

    def ready() -> None:
        freeze_heap()
        process.ready(detail=" and ".join(["HTTP"] * (listening is not None) + ["ZeroMQ"] * (door is not None)))

    app = make_app(service, keys, config.cors_origin)
    http = HttpServer(app, config.drain_timeout_s, ready, config.api_workers, server_context(config))
    engine.start()
    door = None
    if process.index == 0:
        door = ZmqServer(context, config.client_address or process.address("client"), service, keys)
        door.start()
    beating = asyncio.create_task(figures.run())
    watching = asyncio.create_task(keys.watch())
    try:
        if listening is None:
            ready()
        else:
            await http.run_on(listening)
        await stopped.wait()
        await _drained(engine, config.drain_timeout_s)
    finally:
        beating.cancel()
        watching.cancel()
        if door is not None:
            await door.stop()
        engine.stop()
        for link in links:
            link.close()
        context.term()


def _noted(engine: EngineClient, reply: StatsReply) -> None:
    """What the supervisor says of the others' deaths."""
    engine.note_lives(reply.server)
    if reply.state == "failed":
        engine.fail_all(QuireError("engine_failed", "a process of the engine kept dying; the server has given up"))


async def _drained(engine: EngineClient, limit_s: float) -> None:
    """Wait until what came through the ZeroMQ door has ended, at most `limit_s`."""
    deadline = time.monotonic() + limit_s
    while engine.live and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


def main() -> None:
    """Entry point of an api process."""
    process = Process.start("api")
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, default=None)
    fd = parser.parse_known_args()[0].fd
    logging.basicConfig(level=process.config.log_level.upper())
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    listening = None if fd is None else socket.socket(fileno=fd)
    try:
        uvloop.run(serve(process, listening))
    finally:
        process.finish()


if __name__ == "__main__":
    main()
