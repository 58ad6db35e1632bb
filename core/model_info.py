"""ModelInfo: what every process must know of a checkpoint, read once by the supervisor. No torch, no weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from core.errors import QuireError
from quire import SamplingParams

BUILTIN = {"tiny-chat": Path(__file__).resolve().parent.parent / "models" / "builtin" / "tiny-chat"}
DOWNLOADED = ["*.json", "*.safetensors", "*.jinja"]  # never code, never pickles
MAX_JSON_BYTES = 64 * 1024 * 1024
# Kinds of rope scaling whose factor extends max_position_embeddings; for the others that field says it all.
EXTENDING = ("linear", "dynamic")


class ModelInfo(msgspec.Struct, frozen=True):
    """`revision` is the hub's commit or a digest of the files' identity; `engine` goes on every message."""

    path: str
    name: str
    revision: str
    model_type: str
    architectures: list[str]
    vocab_size: int
    max_model_len: int
    eos_ids: list[int]
    bos_id: int | None = None
    sampling: SamplingParams = SamplingParams()

    @property
    def engine(self) -> str:
        """ "name@revision"."""
        return f"{self.name}@{self.revision}"


def resolve(
    model: str,
    *,
    served_model_name: str | None = None,
    revision: str | None = None,
    max_model_len: int | None = None,
    weights: bool = True,
) -> ModelInfo:
    """Find a checkpoint (built-in name, folder, or hub id, which is downloaded) and read its configuration.

    Args:
        weights: whether weight files must be there (False with --load-format dummy).

    Raises:
        QuireError model_invalid, or invalid_config for a max_model_len that the checkpoint does not allow.
    """
    folder, commit = _locate(model, revision)
    config = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json", optional=True)
    if not (folder / "tokenizer.json").is_file():
        raise _invalid(f"{folder} has no tokenizer.json; convert the tokenizer with transformers' save_pretrained")
    if weights and not any(folder.glob("*.safetensors")):
        raise _invalid(f"{folder} has no *.safetensors; only that format is read (--load-format dummy needs none)")
    if not isinstance(config.get("model_type"), str):
        raise _invalid(f"{folder}/config.json has no model_type")
    return ModelInfo(
        path=str(folder),
        name=served_model_name or (model if model in BUILTIN or commit else folder.name),
        revision=(commit or _identity(folder))[:12],
        model_type=config["model_type"],
        architectures=list(config.get("architectures") or []),
        vocab_size=_integer(config, "vocab_size", folder),
        max_model_len=_max_model_len(config, max_model_len, folder),
        eos_ids=_ids(generation.get("eos_token_id", config.get("eos_token_id"))),
        bos_id=config.get("bos_token_id"),
        sampling=_default_sampling(generation),
    )


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object from a checkpoint. Raises QuireError model_invalid in one sentence."""
    if optional and not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise _invalid(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise _invalid(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise _invalid(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise _invalid(f"{path} must hold a JSON object, holds {type(value).__name__}")
    return value


def _invalid(text: str) -> QuireError:
    return QuireError("model_invalid", text, "model")


def _locate(model: str, revision: str | None) -> tuple[Path, str | None]:
    """The checkpoint's folder, and the commit when it is from the hub."""
    if model in BUILTIN:
        return BUILTIN[model], None
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve(), None
    if path.is_file():
        raise _invalid(f"{model} is a file; name the folder that holds config.json and the weights")
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise _invalid(f"{model!r} is neither a folder, nor a hub id (owner/name), nor built in ({', '.join(BUILTIN)})")
    # Half a second of import that only a hub id needs.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=DOWNLOADED))
    except errors.RepositoryNotFoundError:
        raise _invalid(
            f"the hub has no model {model!r} that you may read (HF_TOKEN gives access to gated ones)"
        ) from None
    except errors.RevisionNotFoundError:
        raise _invalid(f"the hub's {model} has no revision {revision!r}") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _invalid(f"cannot get {model} from the hub, and it is not a local folder: {reason}") from None
    return folder, folder.name


def _identity(folder: Path) -> str:
    """Digest of what tells one set of weights from another: config and tokenizer, weight files' headers and sizes."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _integer(config: dict[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise _invalid(f"{folder}/config.json: {key} must be a positive integer, is {value!r}")
    return value


def _max_model_len(config: dict[str, Any], wanted: int | None, folder: Path) -> int:
    longest = _integer(config, "max_position_embeddings", folder)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in EXTENDING:
        longest = int(longest * float(scaling.get("factor", 1.0)))
    elif kind == "yarn" and scaling.get("original_max_position_embeddings"):
        longest = max(longest, int(scaling["original_max_position_embeddings"] * float(scaling.get("factor", 1.0))))
    if wanted is not None and wanted > longest:
        text = f"--max-model-len: {wanted} is more than the {longest} positions of {folder.name}; lower it"
        raise QuireError("invalid_config", text, "max_model_len")
    return wanted or longest


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else [int(item) for item in value]


def _default_sampling(generation: dict[str, Any]) -> SamplingParams:
    """The checkpoint's own advice for requests that leave a parameter out."""
    given: dict[str, Any] = {}
    for key in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        if isinstance(generation.get(key), int | float) and not isinstance(generation[key], bool):
            given[key] = int(generation[key]) if key == "top_k" else float(generation[key])
    if generation.get("do_sample") is False:
        given["temperature"] = 0.0
    return SamplingParams(**given)
