"""ModelInfo: what is read, and one clear sentence for each thing that can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from core.errors import QuireError
from core.model_info import BUILTIN, resolve


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
