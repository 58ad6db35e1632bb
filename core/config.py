"""Config: every option of a server, in one frozen struct; the only reader of argv, files and the environment.

One field is one option: its flag (--max-num-seqs), its key in a TOML file (max_num_seqs), its environment variable
(QUIRE_MAX_NUM_SEQS) and its help follow from the field. Flag wins over environment, environment over file, file over
default. The struct is never patched; derived choices are new values elsewhere.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from core.errors import QuireError

Device = Literal["auto", "cpu", "cuda", "rocm", "null"]
DType = Literal["auto", "float32", "bfloat16"]
Quantization = Literal["none", "int8", "int4", "fp8"]
LogFormat = Literal["text", "json"]
Positive = Annotated[int, Meta(ge=1)]


def _option(help: str, group: str, *, secret: bool = False) -> Meta:
    return Meta(description=help, extra={"group": group, "secret": secret})


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of `quire serve`."""

    # ---- model
    model: Annotated[str, _option("folder or Hugging Face id of the checkpoint", "model")] = "tiny-chat"
    served_model_name: Annotated[str | None, _option("the name that clients use", "model")] = None
    revision: Annotated[str | None, _option("branch, tag or commit on the hub", "model")] = None
    dtype: Annotated[DType, _option("type of weights and activations; auto: float32 on CPU", "model")] = "auto"
    kv_dtype: Annotated[Literal["auto", "float32", "bfloat16", "fp8"], _option("storage of the KV cache", "model")] = (
        "auto"
    )
    kv_scales: Annotated[
        Literal["auto", "checkpoint", "calibrate", "one"],
        _option("scales of an FP8 KV cache; auto: the checkpoint's, else calibrated at start", "model"),
    ] = "auto"
    quantization: Annotated[Quantization, _option("quantise weights while loading", "model")] = "none"
    load_format: Annotated[Literal["auto", "dummy"], _option("dummy: random weights from config.json", "model")] = (
        "auto"
    )
    max_model_len: Annotated[Positive | None, _option("longest sequence, in tokens", "model")] = None
    # ---- server
    host: Annotated[str, _option("address to listen on", "server")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535), _option("TCP port; 0: any free one", "server")] = 8000
    client_address: Annotated[
        str | None, _option("address of the ZeroMQ door (ipc://…); default: in the run folder", "server")
    ] = None
    api_workers: Annotated[int, Meta(ge=1, le=64), _option("api processes on the one port", "server")] = 1
    tokenizer_workers: Annotated[int, Meta(ge=1, le=64), _option("tokenizer processes", "server")] = 1
    max_queued_requests: Annotated[Positive, _option("requests that may wait; more get 429", "server")] = 4096
    max_queued_tokens: Annotated[
        Positive, _option("prompt tokens that may wait, counted as if nothing were cached; more get 429", "server")
    ] = 8_388_608
    max_concurrent_requests: Annotated[
        Positive | None,
        _option(
            "requests that may wait and run, over all doors; default: max-num-seqs + max-queued-requests", "server"
        ),
    ] = None
    max_body_bytes: Annotated[Positive, _option("largest request body", "server")] = 16 * 1024 * 1024
    strict_fields: Annotated[bool, _option("refuse unknown request fields by name", "server")] = False
    drain_timeout_s: Annotated[float, Meta(ge=0), _option("at SIGTERM, seconds for running requests", "server")] = 20.0
    max_restarts: Annotated[
        int, Meta(ge=0), _option("restarts of a process in restart_window_s; then failed", "server")
    ] = 3
    restart_window_s: Annotated[float, Meta(gt=0), _option("seconds over which restarts are counted", "server")] = 120.0
    hang_timeout_s: Annotated[
        float, Meta(ge=1.5), _option("seconds without heartbeat after which a process is restarted", "server")
    ] = 20.0
    worker_hang_timeout_s: Annotated[
        float, Meta(ge=1.5), _option("the same for a worker; one step of it must take less", "server")
    ] = 120.0
    die_with_parent: Annotated[bool, _option("end when the starting process ends (quire.LLM)", "server")] = False
    # ---- security
    api_key: Annotated[
        tuple[str, ...],
        _option(
            "a key that clients must send; may be repeated. Better in QUIRE_API_KEY (several with commas) or a file",
            "security",
            secret=True,
        ),
    ] = ()
    api_key_file: Annotated[
        str | None, _option("file of keys, 'KEY' or 'NAME: KEY' a line; read again when it changes", "security")
    ] = None
    ssl_certfile: Annotated[str | None, _option("PEM certificate chain; HTTP is then HTTPS", "security")] = None
    ssl_keyfile: Annotated[
        str | None, _option("PEM key of the certificate, where it is not in ssl_certfile", "security")
    ] = None
    ssl_keyfile_password: Annotated[str | None, _option("password of that key", "security", secret=True)] = None
    ssl_ca_certs: Annotated[
        str | None, _option("PEM certificates; clients must then show one that these signed", "security")
    ] = None
    cors_origin: Annotated[
        tuple[str, ...],
        _option("web origin whose pages may call (https://host, or *); may be repeated", "security"),
    ] = ()
    # ---- engine
    device: Annotated[Device, _option("hardware target; null: no model at all", "engine")] = "auto"
    tensor_parallel_size: Annotated[int, Meta(ge=1, le=64), _option("ranks that share one model", "engine")] = 1
    max_num_seqs: Annotated[int, Meta(ge=1, le=65536), _option("sequences that run at once", "engine")] = 256
    max_step_tokens: Annotated[Positive | None, _option("most tokens in one step", "engine")] = None
    block_size: Annotated[int | None, _option("tokens per KV block; default by device", "engine")] = None
    num_kv_blocks: Annotated[Positive | None, _option("blocks of the KV cache", "engine")] = None
    kv_gib: Annotated[float | None, _option("size of the KV cache, in GiB", "engine")] = None
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1), _option("share of GPU memory to use", "engine")] = 0.9
    prefix_caching: Annotated[bool, _option("reuse KV blocks of equal prefixes", "engine")] = True
    torch_threads: Annotated[Positive | None, _option("CPU threads of each worker", "engine")] = None
    seed: Annotated[int, _option("seed of random weights (--load-format dummy)", "engine")] = 0
    cache_dir: Annotated[str, _option("folder of compiled kernels", "engine")] = str(Path.home() / ".cache" / "quire")
    # ---- null device
    null_step_ms: Annotated[float, Meta(ge=0), _option("time of a step without a model, in ms", "null device")] = 0.0
    null_step_table: Annotated[
        str | None, _option("step times by tokens, 'tokens:ms,…', interpolated", "null device")
    ] = None
    # ---- cost
    gpu_price_per_hour: Annotated[float | None, _option("price of one GPU; /metrics then tells the cost", "cost")] = (
        None
    )
    # ---- log
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _option("what is logged", "log")] = "info"
    log_format: Annotated[LogFormat, _option("how it is logged", "log")] = "text"

    def __post_init__(self) -> None:
        if self.kv_gib is not None and not self.kv_gib > 0:
            raise ValueError(f"kv_gib: must be above 0, is {self.kv_gib}")
        if self.block_size is not None and self.block_size not in (8, 16, 32, 64, 128):
            raise ValueError(f"block_size: must be one of 8, 16, 32, 64, 128, is {self.block_size}")
        if self.client_address is not None and not self.client_address.startswith("ipc://"):
            raise ValueError("client_address: must be an ipc:// address")
        for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
            if getattr(self, name) is not None and self.ssl_certfile is None:
                raise ValueError(f"{name}: needs --ssl-certfile as well")
        for origin in self.cors_origin:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*]+", origin):
                raise ValueError("cors_origin: must be * or like https://host:port, without a path")

    def to_json(self) -> bytes:
        """For the child processes."""
        return msgspec.json.encode(self)

    def secrets(self) -> list[str]:
        """The values that nobody may read: API keys, passwords."""
        values = [getattr(self, name) for name in _fields_with("secret")]
        return [text for value in values if value for text in ([value] if isinstance(value, str) else value)]

    def without_secrets(self) -> Config:
        """The same for processes that have no use for secrets."""
        empty = {field.name: field.default for field in msgspec.structs.fields(Config)}
        return msgspec.structs.replace(self, **{name: empty[name] for name in _fields_with("secret")})

    @staticmethod
    def from_json(data: bytes) -> Config:
        """The reverse of `to_json`."""
        return msgspec.json.decode(data, type=Config)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` one flag per field of Config, in the fields' groups."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in msgspec.structs.fields(Config):
        if field.name == "model":
            continue
        hint = _Hint(field.name)
        group = groups.setdefault(hint.group, parser.add_argument_group(hint.group))
        default = "" if field.default in (None, False, ()) else f" (default: {field.default})"
        flag = "--" + field.name.replace("_", "-")
        if hint.kind is bool:
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=hint.help, dest=field.name
            )
        elif hint.repeatable:
            group.add_argument(
                flag, action="append", default=None, metavar="TEXT", help=hint.help + default, dest=field.name
            )
        elif hint.choices:
            group.add_argument(flag, choices=hint.choices, default=None, help=hint.help + default, dest=field.name)
        else:
            name = {int: "N", float: "X"}.get(hint.kind, "TEXT")
            group.add_argument(flag, default=None, metavar=name, help=hint.help + default, dest=field.name)


def parse(argv: Sequence[str], environment: Mapping[str, str] | None = None, prog: str = "quire serve") -> Config:
    """The Config that argv, the environment and --config FILE describe.

    Raises:
        QuireError invalid_config: names the option, the value and the fix. SystemExit for --help and unknown flags.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Serve a model over OpenAI-compatible HTTP and over ZeroMQ.",
        epilog="Each option is also a key of the --config file (max_num_seqs) and an environment variable "
        "(QUIRE_MAX_NUM_SEQS). Examples: quire serve | quire serve Qwen/Qwen3-4B --port 8001",
    )
    parser.add_argument("model", nargs="?", default=None, help="folder or Hugging Face id; default: built-in tiny-chat")
    parser.add_argument("--config", default=None, metavar="FILE", help="TOML file with any of these options")
    add_options(parser)
    flags = {key: value for key, value in vars(parser.parse_args(list(argv))).items() if value is not None}
    values: dict[str, Any] = {}
    if (path := flags.pop("config", None)) is not None:
        values.update(_read_file(Path(path)))
    values.update(_read_environment(os.environ if environment is None else environment))
    values.update(flags)
    return build(values)


def build(values: Mapping[str, Any]) -> Config:
    """A Config from loosely typed values (texts are converted). Raises QuireError invalid_config."""
    known = {field.name for field in msgspec.structs.fields(Config)}
    for key in values:
        if key not in known:
            raise QuireError("invalid_config", f"{key}: unknown option; see quire serve --help", key)
    values = {name: _listed(name, value) for name, value in values.items()}
    try:
        return msgspec.convert(values, Config, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        text = str(error)
        field = text.rsplit("$.", 1)[-1].rstrip("`") if "$." in text else text.split(":", 1)[0]
        given = f", got {values[field]!r}" if field in values and field not in _fields_with("secret") else ""
        raise QuireError(
            "invalid_config",
            f"--{field.replace('_', '-')}: {text.split(' - at')[0].removeprefix(field + ': ')}{given}",
            field,
        ) from None


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for processes that have no use for secrets."""
    secret = {"QUIRE_" + name.upper() for name in _fields_with("secret")}
    return {name: value for name, value in environment.items() if name not in secret}


def _fields_with(mark: str) -> list[str]:
    """Names of the fields whose option has a mark."""
    names = [field.name for field in msgspec.structs.fields(Config)]
    return [name for name in names if _Hint(name).extra[mark]]


def _listed(name: str, value: Any) -> Any:
    """The text of an environment variable as the list that a repeatable option is."""
    if not isinstance(value, str) or not _Hint(name).repeatable:
        return value
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not parts:  # most likely an unset secret: to go on without keys would open the server
        text = f"QUIRE_{name.upper()}: is set but empty; unset it, or give it a value"
        raise QuireError("invalid_config", text, name)
    return parts


@functools.cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Config, include_extras=True)


class _Hint:
    """What the flag of a field looks like, read from its annotation."""

    def __init__(self, name: str) -> None:
        hint = _hints()[name]
        option = next(meta for meta in hint.__metadata__ if meta.extra)
        self.extra: dict[str, Any] = option.extra
        self.group: str = option.extra["group"]
        self.help: str = option.description
        bare = _bare(hint)
        self.choices: tuple[str, ...] = get_args(bare) if get_origin(bare) is Literal else ()
        self.repeatable = get_origin(bare) is tuple
        self.kind: Any = bare


def _bare(hint: Any) -> Any:
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    inner = [arm for arm in get_args(hint) if arm is not type(None)]
    if get_origin(hint) is not Literal and len(inner) == 1:
        return _bare(inner[0])
    return hint


def _read_environment(environment: Mapping[str, str]) -> dict[str, str]:
    fields = msgspec.structs.fields(Config)
    return {f.name: environment[name] for f in fields if (name := "QUIRE_" + f.name.upper()) in environment}


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise QuireError("invalid_config", f"--config: cannot read {path}: {error.strerror}", "config") from None
    except tomllib.TOMLDecodeError as error:
        raise QuireError("invalid_config", f"--config: {path} is not valid TOML: {error}", "config") from None
