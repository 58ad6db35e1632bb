"""`quire serve`: resolve the model, take the port, start the processes, say where to find them."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import socket
import sys
import time

from core import config as configuration
from core.config import Config
from core.errors import QuireError
from core.model_info import ModelInfo, resolve
from core.process import die_with_parent
from tools.run_dir import RunDir
from tools.supervisor import Supervisor


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    began = time.monotonic()
    try:
        config = configuration.parse(argv)
        logging.basicConfig(level=config.log_level.upper())
        if config.die_with_parent:
            die_with_parent(os.getppid())
        return serve(config, began)
    except QuireError as error:
        print(f"quire serve: {error.message}", file=sys.stderr)
        return 2


def serve(config: Config, began: float) -> int:
    """Start the server that `config` describes and stay until it ends."""
    version = importlib.metadata.version("quire")
    say(f"Quire {version}")
    model = resolve(
        config.model,
        served_model_name=config.served_model_name,
        revision=config.revision,
        max_model_len=config.max_model_len,
        weights=config.load_format != "dummy" and config.device != "null",
    )
    say(f"  model        {model.name} ({model.model_type}, up to {model.max_model_len:,} tokens) from {model.path}")
    listening = bind(config)
    host, port = listening.getsockname()[:2]
    run_dir = RunDir(str(port))
    run_dir.write("pid", str(os.getpid()).encode())
    supervisor = Supervisor(config, model, run_dir, listening.fileno(), say)

    def ready() -> None:
        url = f"http://{'[' + host + ']' if ':' in host else host}:{port}"
        run_dir.write_json("server.json", server_facts(config, model, url, run_dir))
        say(f"ready after {time.monotonic() - began:.1f} s: {model.name} on {url}  Try:")
        say(try_it(url, model.name))

    try:
        return supervisor.run(ready)
    finally:
        run_dir.remove()
        listening.close()


def server_facts(config: Config, model: ModelInfo, url: str | None, run_dir: RunDir) -> dict[str, object]:
    """What clients and `quire status` read to find this server."""
    return {
        "url": url,
        "client_address": config.client_address or f"ipc://{run_dir.path}/client",
        "pid": os.getpid(),
        "model": model.name,
        "engine": model.engine,
        "started": time.time(),
        "version": importlib.metadata.version("quire"),
    }


def bind(config: Config) -> socket.socket:
    """Take the port before anything is started. The api processes inherit the socket and listen on it."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
    except OSError as error:
        listening.close()
        text = f"cannot listen on {config.host}:{config.port}: {error.strerror}; choose another --port or --host"
        raise QuireError("invalid_config", text, "port") from None
    return listening


def try_it(url: str, model: str) -> str:
    """A curl that shows a streamed answer."""
    body = f'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "What is 47 + 385?"}}]}}'
    return f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def say(line: str) -> None:
    """A line for whoever started the server."""
    print(line, flush=True)
