"""`quire serve`: resolve the model, take the port, start the processes, say where to find them."""

from __future__ import annotations

import importlib.metadata
import ipaddress
import logging
import os
import socket
import stat
import sys
import time
from pathlib import Path

import setproctitle

from api.keys import Keys
from api.tls import server_context
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
        hide_secrets(config, argv)
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
    keys = Keys(config.api_key, config.api_key_file)
    keys.load()
    if keys.required and not len(keys):
        raise QuireError("invalid_config", f"--api-key-file: {config.api_key_file} holds no key", "api_key_file")
    server_context(config)
    check_client_address(config)
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
    say_who_may_enter(keys, host)
    run_dir = RunDir(str(port))
    run_dir.write("pid", str(os.getpid()).encode())
    supervisor = Supervisor(config, model, run_dir, listening.fileno(), say)

    def ready() -> None:
        scheme = "https" if config.ssl_certfile else "http"
        url = f"{scheme}://{'[' + host + ']' if ':' in host else host}:{port}"
        run_dir.write_json("server.json", server_facts(config, model, url, run_dir))
        say(f"ready after {time.monotonic() - began:.1f} s: {model.name} on {url}  Try:")
        say(try_it(url, model.name, keys.required))

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


def say_who_may_enter(keys: Keys, host: str) -> None:
    """The number of keys, or a warning where other machines need none."""
    if keys.required:
        say(f"  keys         {len(keys)}; every route but /health needs one")
    elif not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        say(f"  warning      whoever reaches {host} may use this server; give it keys (--api-key-file, QUIRE_API_KEY)")


def check_client_address(config: Config) -> None:
    """ZeroMQ replaces whatever is at an ipc address. Raises QuireError("invalid_config") where that is no socket."""
    path = Path((config.client_address or "").removeprefix("ipc://"))
    if config.client_address and path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        text = f"--client-address: {path} exists and is no socket; choose another path"
        raise QuireError("invalid_config", text, "client_address")


def hide_secrets(config: Config, argv: list[str]) -> None:
    """Everybody may read a process's arguments: take the secrets out of ours."""
    shown = [_masked(argument, config.secrets()) for argument in argv]
    if shown != argv:
        setproctitle.setproctitle(" ".join(["quire serve", *shown]))


def _masked(text: str, secrets: list[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def try_it(url: str, model: str, keyed: bool) -> str:
    """A curl that shows a streamed answer."""
    body = f'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "What is 47 + 385?"}}]}}'
    key = ' -H "Authorization: Bearer $QUIRE_API_KEY"' if keyed else ""
    return f"  curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"


def say(line: str) -> None:
    """A line for whoever started the server."""
    print(line, flush=True)
