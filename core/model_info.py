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
NOT_DOWNLOADED = ["consolidated*", "original/*", "onnx/*"]  # the same weights once more, in forms that are not read
MAX_JSON_BYTES = 64 * 1024 * 1024
NUM_PIECES, PIECE_BYTES = 64, 4096  # of each weight file, for the digest: a few milliseconds
# Kinds of rope scaling whose factor extends max_position_embeddings; for the others that field says it all.
EXTENDING = ("linear", "dynamic")
MAX_FACTOR = 1024
# What generation_config.json may advise, as core/sampling.py allows it.
ADVICE = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 2**31 - 1),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


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
    if weights:
        _check_shards(folder)
    if not isinstance(config.get("model_type"), str):
        raise _invalid(f"{folder}/config.json has no model_type")
    return ModelInfo(
        path=str(folder),
        name=served_model_name or (model if model in BUILTIN or commit else folder.name),
        revision=(commit or _identity(folder))[:12],
        model_type=config["model_type"],
        architectures=[name for name in config.get("architectures") or [] if isinstance(name, str)],
        vocab_size=_integer(config, "vocab_size", folder),
        max_model_len=_max_model_len(config, max_model_len, folder),
        eos_ids=_eos_ids(generation, config, folder),
        bos_id=next(iter(_ids(config.get("bos_token_id"), "bos_token_id", folder)), None),
        sampling=_default_sampling(generation),
    )


def read_config(model: str, revision: str | None = None) -> tuple[str, dict[str, Any], int]:
    """A checkpoint's name, its config.json and its longest sequence. From the hub, that one file is downloaded.

    Raises:
        QuireError model_invalid.
    """
    folder, commit = _locate(model, revision, ["config.json"])
    config = read_json(folder / "config.json")
    return model if model in BUILTIN or commit else folder.name, config, _max_model_len(config, None, folder)


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
    except (ValueError, RecursionError) as error:
        raise _invalid(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise _invalid(f"{path} must hold a JSON object, holds {type(value).__name__}")
    return value


def _invalid(text: str) -> QuireError:
    return QuireError("model_invalid", text, "model")


def _locate(model: str, revision: str | None, files: list[str] = DOWNLOADED) -> tuple[Path, str | None]:
    """The checkpoint's folder, and the commit when it is from the hub, of which `files` are downloaded."""
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
        folder = Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=files, ignore_patterns=NOT_DOWNLOADED
            )
        )
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
    """Digest of what tells one checkpoint from another, the same on every machine.

    All of the small files; of a weight file its size, its header and some pieces, as two fine-tunes of one model have
    equal headers and a hash of all bytes would take minutes.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja"):
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(header_bytes, MAX_JSON_BYTES)))
                for piece in range(NUM_PIECES):
                    file.seek(size * piece // NUM_PIECES)
                    digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def _check_shards(folder: Path) -> None:
    """A sharded checkpoint must have all its files. Raises QuireError model_invalid."""
    shards = read_json(folder / "model.safetensors.index.json", optional=True).get("weight_map") or {}
    if not isinstance(shards, dict):
        raise _invalid(f"{folder}/model.safetensors.index.json: weight_map must be an object")
    missing = [name for name in sorted({str(name) for name in shards.values()}) if not (folder / name).is_file()]
    if missing:
        raise _invalid(f"{folder} lacks {len(missing)} of its weight files, the first is {missing[0]}")


def _integer(config: dict[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _invalid(f"{folder}/config.json: {key} must be a positive integer, is {value!r}")
    return value


def _max_model_len(config: dict[str, Any], wanted: int | None, folder: Path) -> int:
    longest = _scaled(config, _integer(config, "max_position_embeddings", folder), folder)
    if wanted is not None and wanted > longest:
        text = f"--max-model-len: {wanted} is more than the {longest} positions of {folder.name}; lower it"
        raise QuireError("invalid_config", text, "max_model_len")
    return wanted or longest


def _scaled(config: dict[str, Any], longest: int, folder: Path) -> int:
    """The positions that a checkpoint means, with its rope scaling."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise _invalid(f"{folder}/config.json: rope_scaling must be an object, is {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in (*EXTENDING, "yarn"):
        return longest
    factor = scaling.get("factor", 1.0)
    if not isinstance(factor, int | float) or not 1 <= factor <= MAX_FACTOR:
        raise _invalid(f"{folder}/config.json: rope_scaling: factor must be from 1 to {MAX_FACTOR}, is {factor!r}")
    # YaRN says from which length it extends; where it does not, it is max_position_embeddings.
    original = scaling.get("original_max_position_embeddings") if kind == "yarn" else None
    if isinstance(original, int) and not isinstance(original, bool) and original > 0:
        return max(longest, int(original * factor))
    return int(longest * factor)


def _ids(value: Any, key: str, folder: Path) -> list[int]:
    """One id or a list of them."""
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
        raise _invalid(f"{folder}: {key} must be a token id or a list of them, is {value!r}")
    return ids


def _eos_ids(generation: dict[str, Any], config: dict[str, Any], folder: Path) -> list[int]:
    """generation_config.json knows better than config.json where a turn ends."""
    value = generation.get("eos_token_id")
    return _ids(config.get("eos_token_id") if value is None else value, "eos_token_id", folder)


def _default_sampling(generation: dict[str, Any]) -> SamplingParams:
    """The checkpoint's own advice for requests that leave a parameter out; values out of range are no advice."""
    given: dict[str, Any] = {}
    for key, (low, high) in ADVICE.items():
        value = generation.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            given[key] = int(value) if key == "top_k" else float(value)
    if generation.get("do_sample") is False:
        given["temperature"] = 0.0
    return SamplingParams(**given)
