"""System: limits, shared memory, folders, disk, the port and the hub."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub.constants as hub

import quire
from core.config import Config
from core.errors import QuireError
from core.model_info import BUILTIN
from tools.doctor.finding import Finding, Status
from tools.run_dir import check_length, private_root
from tools.serve import bind

GIB = 2**30
SPARE_FILES = 256  # of a process, beside one for each connection
SHARED_BYTES = 64 * 2**20  # /dev/shm of a container that nobody has asked for more
NCCL_BYTES = GIB
CACHE_BYTES = GIB  # compiled kernels take some hundred MB
DOWNLOAD_BYTES = 20 * GIB
HUB_TIMEOUT_S = 3.0


def processors() -> Finding:
    """How many the processes may use."""
    count = len(os.sched_getaffinity(0))
    text = f"{count} processors for at least five processes"
    if count >= 4:
        return Finding("processors", "ok", text)
    return Finding(
        "processors", "warning", f"{text}: they wait for each other", "give the machine or container 4 or more"
    )


def open_files(config: Config) -> Finding:
    """An api process has a file for each connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = config.max_queued_requests // config.api_workers + SPARE_FILES
    text = f"{_number(soft)} open files per process"
    if soft in (-1, resource.RLIM_INFINITY) or soft >= wanted:
        return Finding("open files", "ok", text)
    fix = f"ulimit -n {wanted}"
    if hard not in (-1, resource.RLIM_INFINITY) and hard < wanted:
        fix = f"raise the hard limit of {hard:,} (limits.conf, or the service's), or lower --max-queued-requests"
    text += f"; --max-queued-requests {config.max_queued_requests} needs {wanted} in an api process"
    return Finding("open files", "problem" if soft < 2 * SPARE_FILES else "warning", text, fix)


def shared_memory(config: Config, folder: Path = Path("/dev/shm")) -> Finding:
    """NCCL and Gloo pass data between the ranks of one machine through it."""
    try:
        size = shutil.disk_usage(folder)
    except OSError as error:
        return Finding("shared memory", "warning", f"{folder}: {error.strerror}", f"mount a tmpfs on {folder}")
    text = f"{folder} has {_size(size.free)} free of {_size(size.total)}"
    wanted = NCCL_BYTES if config.tensor_parallel_size > 1 else SHARED_BYTES
    if size.free >= wanted:
        return Finding("shared memory", "ok", text)
    fix = "start the container with --shm-size=8g or --ipc=host, or remove what lies there"
    status: Status = "problem" if config.tensor_parallel_size > 1 else "warning"
    return Finding("shared memory", status, f"{text}; {_size(wanted)} are wanted", fix)


def port(config: Config) -> Finding:
    """Whether the server could listen."""
    if config.port == 0:
        return Finding("port", "ok", "any free one is taken")
    try:
        bind(config).close()
    except QuireError as error:
        where = f"{config.host}:{config.port}"
        ours = [server for server in quire.find_servers() if str(server.get("url")).endswith(f":{config.port}")]
        if ours:
            text = f"{where} is taken by Quire (pid {ours[0]['pid']}, {ours[0]['model']})"
            return Finding("port", "problem", text, "end that server, or choose another --port")
        return Finding("port", "problem", error.message.partition(";")[0], "choose another --port or --host")
    return Finding("port", "ok", f"{config.host}:{config.port} is free")


def kernel_cache(config: Config) -> list[Finding]:
    """The folder of compiled kernels: can be written, and has room."""
    folder = Path(config.cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"quire")
    except OSError as error:
        text = f"{folder} cannot be written ({error.strerror}): kernels are compiled at every start"
        return [Finding("kernel cache", "problem", text, "give it to this user, or choose another --cache-dir")]
    return [
        Finding("kernel cache", "ok", f"{folder} can be written"),
        _disk("disk", folder, CACHE_BYTES, "the kernel cache", "--cache-dir"),
    ]


def download_folder(config: Config) -> Finding:
    """Where checkpoints of the hub are kept."""
    if not _from_hub(config.model):
        return Finding("downloads", "skipped", "the model is not from the hub")
    return _disk("downloads", Path(hub.HF_HUB_CACHE), DOWNLOAD_BYTES, "checkpoints", "HF_HOME")


def _disk(name: str, folder: Path, wanted: int, what: str, option: str) -> Finding:
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return Finding(name, "warning", f"{folder}: {error.strerror}", f"move it with {option}")
    text = f"{_size(free)} free for {what} in {folder}"
    if free >= wanted:
        return Finding(name, "ok", text)
    return Finding(name, "problem" if free < wanted // 10 else "warning", text, f"make room, or move it with {option}")


def sockets(config: Config) -> Finding:
    """The folder of the processes' sockets."""
    try:
        root = private_root()
        check_length(root / str(config.port))
    except QuireError as error:
        text, _, fix = error.message.rpartition("; ")
        return Finding("sockets", "problem", text, fix)
    except OSError as error:
        text = f"{tempfile.gettempdir()} cannot be written: {error.strerror}"
        return Finding("sockets", "problem", text, "set TMPDIR to a folder of your own")
    return Finding("sockets", "ok", f"in {root}")


def hub_access(config: Config) -> Finding:
    """Whether checkpoints could be downloaded. HF_HUB_OFFLINE is respected."""
    wanted = _from_hub(config.model)
    cached = wanted and Path(hub.HF_HUB_CACHE, f"models--{config.model.replace('/', '--')}").is_dir()
    if hub.HF_HUB_OFFLINE:
        if wanted and not cached:
            text = f"HF_HUB_OFFLINE is set, and {config.model} is not in {hub.HF_HUB_CACHE}"
            return Finding("hub", "problem", text, "download it first, unset HF_HUB_OFFLINE, or name a folder")
        return Finding("hub", "skipped", "HF_HUB_OFFLINE is set: nothing is asked")
    error = _unreachable(hub.ENDPOINT)
    if error is None:
        return Finding("hub", "ok", f"{hub.ENDPOINT} answers")
    fix = "look at the network and HTTPS_PROXY; HF_HUB_OFFLINE=1 saves the attempts; folders are served without it"
    status: Status = "problem" if wanted and not cached else "warning"
    return Finding("hub", status, f"{hub.ENDPOINT} does not answer: {error}", fix)


def _unreachable(url: str) -> str | None:
    """Why there is no answer; None when there is any, whatever it says."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT_S):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__


def _from_hub(model: str) -> bool:
    """As core/model_info.py tells a hub id from a folder."""
    with contextlib.suppress(OSError):
        if Path(model).expanduser().exists():
            return False
    return model not in BUILTIN and model.count("/") == 1 and not model.startswith(("/", ".", "~"))


def _number(limit: int) -> str:
    return "unlimited" if limit in (-1, resource.RLIM_INFINITY) or limit >= sys.maxsize else f"{limit:,}"


def _size(count: int) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.0f} MiB"
