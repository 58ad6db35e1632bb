"""ModelInfo: what is read, and one clear sentence for each thing that can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from core.errors import QuireError
from core.model_info import BUILTIN, ModelInfo, read_config, resolve
from core.sampling import SamplingLimits, validate
from quire import SamplingParams


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "checkpoint"
    shutil.copytree(BUILTIN["tiny-chat"], target)
    return target


def change(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_builtin() -> None:
    info = resolve("tiny-chat")
    assert (info.name, info.model_type, info.vocab_size, info.max_model_len) == ("tiny-chat", "llama", 4096, 2048)
    assert info.eos_ids == [3, 1]
    assert info.sampling.temperature == 0.0  # its generation_config says do_sample: false
    assert info.engine == f"tiny-chat@{info.revision}"


def test_a_folder_has_a_revision_of_its_own(folder: Path) -> None:
    first = resolve(str(folder), served_model_name="mine")
    assert first.name == "mine"
    change(folder, rope_theta=1.0)
    assert resolve(str(folder)).revision != first.revision
    assert resolve(str(folder)).name == "checkpoint"


def test_dummy_weights_need_no_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert resolve(str(folder), weights=False).model_type == "llama"
    with pytest.raises(QuireError, match=r"no \*\.safetensors"):
        resolve(str(folder))


def test_length_follows_rope_scaling(folder: Path) -> None:
    change(folder, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert resolve(str(folder)).max_model_len == 8192
    change(folder, rope_scaling={"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256})
    assert resolve(str(folder)).max_model_len == 2048
    assert resolve(str(folder), max_model_len=100).max_model_len == 100
    with pytest.raises(QuireError, match="3000 is more than the 2048") as caught:
        resolve(str(folder), max_model_len=3000)
    assert caught.value.param == "max_model_len"


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        ({"type": "dynamic", "factor": 2}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0}, 8192),
        ({"rope_type": "default"}, 2048),
        ({"full_attention": {"rope_type": "default"}}, 2048),
        (None, 2048),
    ],
)
def test_every_kind_of_scaling(folder: Path, scaling: Any, length: int) -> None:
    change(folder, rope_scaling=scaling)
    assert resolve(str(folder)).max_model_len == length


@pytest.mark.parametrize("scaling", ["yes", {"rope_type": "linear", "factor": "two"}, {"type": "yarn", "factor": 1e30}])
def test_nonsense_of_scaling(folder: Path, scaling: Any) -> None:
    change(folder, rope_scaling=scaling)
    with pytest.raises(QuireError, match="rope_scaling"):
        resolve(str(folder))


def test_the_revision_is_of_the_content(folder: Path) -> None:
    revision = resolve(str(folder)).revision
    weights = folder / "model.safetensors"
    os.utime(weights, (1, 1))
    assert resolve(str(folder)).revision == revision == resolve("tiny-chat").revision
    data = bytearray(weights.read_bytes())
    data[-len(data) // 2 :] = bytes(len(data) // 2 + len(data) % 2)  # other weights, same size and header
    weights.write_bytes(data)
    assert resolve(str(folder)).revision != revision


def test_missing_shards(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00003.safetensors", "c": "x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(QuireError, match="lacks 2 of its weight files, the first is model-00002"):
        resolve(str(folder))
    assert resolve(str(folder), weights=False).vocab_size == 4096


@pytest.mark.parametrize("eos", ["</s>", [1, None], -1, True])
def test_ids_that_are_none(folder: Path, eos: Any) -> None:
    (folder / "generation_config.json").write_text("{}")
    change(folder, eos_token_id=eos)
    with pytest.raises(QuireError, match="eos_token_id must be a token id"):
        resolve(str(folder))


def test_it_travels_as_json(folder: Path) -> None:
    change(folder, bos_token_id=[5, 6], architectures=["A", None])
    info = resolve(str(folder))
    assert info.bos_id == 5
    assert msgspec.json.decode(msgspec.json.encode(info), type=ModelInfo) == info


def test_advice_out_of_range_is_no_advice(folder: Path) -> None:
    advice = {"temperature": -1, "top_k": -1, "top_p": 0.0, "repetition_penalty": float("nan"), "min_p": True}
    (folder / "generation_config.json").write_text(json.dumps(advice))
    info = resolve(str(folder))
    assert info.sampling == SamplingParams()
    validate(info.sampling, SamplingLimits(info.vocab_size, info.max_model_len))


def test_advice_of_the_checkpoint(folder: Path) -> None:
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": 7})
    )
    info = resolve(str(folder))
    assert (info.sampling.temperature, info.sampling.top_p, info.sampling.top_k) == (0.6, 0.9, 20)
    assert info.eos_ids == [7]


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_missing_files(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(QuireError, match=missing) as caught:
        resolve(str(folder))
    assert caught.value.code == "model_invalid"


def test_nonsense(folder: Path) -> None:
    with pytest.raises(QuireError, match="neither a folder, nor a hub id"):
        resolve("/no/such/folder")
    with pytest.raises(QuireError, match="is a file"):
        resolve(str(folder / "config.json"))
    change(folder, vocab_size="many")
    with pytest.raises(QuireError, match="vocab_size must be a positive integer, is 'many'"):
        resolve(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(QuireError, match="not valid JSON"):
        resolve(str(folder))


def test_the_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(QuireError, match="cannot get no-such/model from the hub"):
        resolve("no-such/model")


def test_config_alone_needs_neither_weights_nor_tokenizer(folder: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).unlink()
    change(folder, rope_scaling={"rope_type": "linear", "factor": 2.0})
    name, config, longest = read_config(str(folder))
    assert (name, config["num_hidden_layers"], longest) == ("checkpoint", 8, 4096)
    assert read_config("tiny-chat")[0] == "tiny-chat"
    (folder / "config.json").unlink()
    with pytest.raises(QuireError, match=r"cannot read .*config\.json"):
        read_config(str(folder))


def test_config_alone_is_all_that_the_hub_is_asked_for(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        asked.update(options, model=model)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    name, _, _ = read_config("owner/name", "main")
    assert name == "owner/name"
    assert (asked["model"], asked["revision"], asked["allow_patterns"]) == ("owner/name", "main", ["config.json"])
