"""Scales of an FP8 cache: from checkpoints, calibrated against transformers' keys and values, and what they are for."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.config import Config
from core.errors import QuireError
from core.model_info import BUILTIN, resolve
from hw.comm import Comm
from hw.cpu.backend import CpuBackend
from hw.kvcache import KVCachePool, KVLayout
from hw.select import select
from models.layers.decoder import Decoder
from models.runtime.build import load_runner
from models.runtime.kv_scales import MARGIN, checkpoint_scales, largest_values, prompts, set_kv_scales
from quire import SamplingParams
from tests.models.conftest import checkpoint as checkpoint  # the fixture
from tests.models.running import load, logits_of
from tests.models.runtime.driving import Driver, Stream
from tests.models.test_parallel import Exchange, ThreadComm

Checkpoint = Callable[..., tuple[Path, Any]]
F8 = torch.float8_e4m3fn
VOCAB, LAYERS = 131, 3


def pool_of(model: Decoder, dtype: torch.dtype = F8) -> KVCachePool:
    return CpuBackend().make_kv_cache(KVLayout.build(model.kv_layers, 8, dtype).with_blocks(4))


def scales_of(folder: Path, source: Any = "auto", *, dummy: bool = False, comm: Comm | None = None) -> torch.Tensor:
    model = load(folder, comm=comm)
    pool = pool_of(model)
    set_kv_scales(pool, model, source, folder, dummy=dummy, vocab_size=VOCAB, max_model_len=128)
    assert pool.scales is not None
    return pool.scales


def add(folder: Path, **extra: Any) -> None:
    """More tensors for a checkpoint; "." in names is written as "__"."""
    tensors = load_file(folder / "model.safetensors")
    more = {name.replace("__", "."): torch.as_tensor(value) for name, value in extra.items()}
    save_file(tensors | more, folder / "model.safetensors")


def both(k_name: str, v_name: str) -> dict[str, float]:
    names = {}
    for layer in range(LAYERS):
        names[f"model__layers__{layer}__self_attn__{k_name}"] = 0.25 + layer
        names[f"model__layers__{layer}__self_attn__{v_name}"] = 0.5 + layer
    return names


STORED = torch.tensor([[0.25, 0.5], [1.25, 1.5], [2.25, 2.5]])


# ---------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_largest_keys_and_values_are_those_of_transformers(checkpoint: Checkpoint, kind: str) -> None:
    windows = {"sliding_window": 11} if kind == "mistral" else {}
    folder, reference = checkpoint(kind, random.randrange(1000), **windows)
    texts = prompts(folder, VOCAB, 64)
    with torch.no_grad():
        want = torch.zeros(LAYERS, 2)
        for ids in texts:
            # A window drops old keys from this cache: piece by piece, all of them are seen once.
            for stop in range(8, 65, 8):
                seen = reference(torch.tensor([ids[:stop]]), use_cache=True).past_key_values
                for layer, cache in enumerate(seen.layers):
                    for column, tensor in enumerate((cache.keys, cache.values)):
                        want[layer, column] = max(want[layer, column], tensor.abs().max())
    torch.testing.assert_close(largest_values(load(folder), texts, VOCAB), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(scales_of(folder), want * MARGIN / 448, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_have_the_scales_of_one(checkpoint: Checkpoint, size: int) -> None:
    folder, _ = checkpoint("llama", 3)
    want = scales_of(folder)
    exchange = Exchange(size)
    with ThreadPoolExecutor(size) as threads:
        ranks = list(threads.map(lambda rank: scales_of(folder, comm=ThreadComm(rank, exchange)), range(size)))
    for scales in ranks:
        assert torch.equal(scales, ranks[0])
        torch.testing.assert_close(scales, want, rtol=1e-5, atol=0)
    shard = largest_values(load(folder, comm=Alone(0, size)), prompts(folder, VOCAB, 64), VOCAB) * MARGIN / 448
    assert not torch.allclose(shard, want, rtol=1e-3), "a rank's own values would differ"


class Alone(Comm):
    """A rank that hears nothing of the others."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.zeros(x.shape[0], x.shape[1] * (self.size - 1))], 1)


def test_prompts_have_one_length_and_differ(checkpoint: Checkpoint, tmp_path: Path, caplog: Any) -> None:
    for folder, vocab in ((BUILTIN["tiny-chat"], 4096), (BUILTIN["tiny-chat"], 50), (tmp_path, 128256), (tmp_path, 7)):
        with caplog.at_level(logging.INFO, "quire.kv_scales"):
            texts = prompts(folder, vocab, 64)
        assert ("no tokenizer" in caplog.text) == (folder == tmp_path)
        assert all(len(ids) == 64 and min(ids) >= 0 and max(ids) < vocab for ids in texts)
        if vocab > 7:
            assert len({tuple(ids) for ids in texts}) == len(texts)
    (tmp_path / "tokenizer.json").write_text("{")
    assert len(prompts(tmp_path, 100, 3)[0]) == 3


def test_no_value_is_clipped_where_one_would_clip(checkpoint: Checkpoint) -> None:
    """Values far beyond 448: 1.0 ruins the answer, calibration costs what e4m3 costs."""
    folder, _ = checkpoint("llama", 5)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.self_attn.v_proj.weight"] *= 3000
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] /= 3000
    save_file(tensors, folder / "model.safetensors")
    model = load(folder)
    sequences = [[random.randrange(VOCAB) for _ in range(length)] for length in (40, 1, 23)]
    want = torch.cat(logits_of(model, sequences, [9, 1, 4]))
    errors = {}
    for source in ("one", "calibrate"):

        def set_scales(pool: KVCachePool, source: Any = source) -> None:
            set_kv_scales(pool, model, source, folder, dummy=False, vocab_size=VOCAB, max_model_len=128)

        got = torch.cat(logits_of(model, sequences, [9, 1, 4], F8, set_scales))
        errors[source] = float((got - want).norm() / want.norm())
    assert 0.001 < errors["calibrate"] < 0.15, errors
    assert errors["one"] > 0.3, errors


def test_values_that_are_not_finite_are_refused(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("llama", 0)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(QuireError, match="not finite"):
        scales_of(folder)


def test_a_layer_of_zeros_is_said(checkpoint: Checkpoint, caplog: Any) -> None:
    folder, _ = checkpoint("llama", 0)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors")
    scales = scales_of(folder)
    assert float(scales[1, 1]) == 1.0
    assert "layers [1] are all zero" in caplog.text


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("k_name", "v_name"),
    [
        ("k_scale", "v_scale"),
        ("attn__k_scale", "attn__v_scale"),
        ("k_proj__k_scale", "v_proj__v_scale"),
        ("qkv_proj__k_scale", "qkv_proj__v_scale"),
        ("k_proj__output_scale", "v_proj__output_scale"),
    ],
)
def test_names_of_scales(checkpoint: Checkpoint, k_name: str, v_name: str) -> None:
    folder, _ = checkpoint("llama", 0)
    unused = {"model__layers__0__self_attn__q_scale": 3.0, "model__layers__0__self_attn__prob_scale": 9.0}
    add(folder, **both(k_name, v_name), **unused, model__layers__0__self_attn__q_proj__output_scale=5.0)
    for source in ("auto", "checkpoint"):
        assert torch.equal(scales_of(folder, source), STORED)
    assert not torch.allclose(scales_of(folder, "calibrate"), STORED)
    assert not torch.allclose(scales_of(folder, dummy=True), STORED)


def test_one_scale_for_both(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("llama", 0)
    add(folder, **{f"model__layers__{layer}__self_attn__kv_scale": layer + 1.0 for layer in range(LAYERS)})
    assert torch.equal(scales_of(folder), torch.tensor([[1.0, 1], [2, 2], [3, 3]]))
    add(folder, **both("k_scale", "v_scale"))
    assert torch.equal(scales_of(folder), STORED), "the two are newer than the one"


def test_a_device_with_fnuz_stores_the_same_values(checkpoint: Checkpoint) -> None:
    """Its format reaches half as far: with the checkpoint's own scales, values above 240 of them would be clipped."""
    folder, _ = checkpoint("llama", 0)
    add(folder, **both("k_scale", "v_scale"))
    model = load(folder)
    pool = pool_of(model, torch.float8_e4m3fnuz)
    set_kv_scales(pool, model, "auto", folder, dummy=False, vocab_size=VOCAB, max_model_len=128)
    assert pool.scales is not None
    assert torch.equal(pool.scales, 2 * STORED)
    stored = torch.tensor([448.0, 300.0, 0.013]) * STORED[0, 0]
    as_fn = (stored / STORED[0, 0]).to(F8).float() * STORED[0, 0]
    as_fnuz = (stored / pool.scales[0, 0]).to(pool.dtype).float() * pool.scales[0, 0]
    assert torch.equal(as_fnuz, as_fn)


def test_scales_per_head_give_their_largest(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("llama", 0)
    add(folder, **{name: [0.1, value] for name, value in both("k_scale", "v_scale").items()})
    assert torch.equal(scales_of(folder), STORED)


def test_some_layers_are_not_enough(checkpoint: Checkpoint, caplog: Any) -> None:
    folder, _ = checkpoint("llama", 0)
    plain = scales_of(folder)
    add(folder, model__layers__0__self_attn__k_scale=9.0, model__layers__0__self_attn__v_scale=9.0)
    assert torch.equal(scales_of(folder), plain), "calibrated"
    assert "none for layers 1, 2" in caplog.text
    with pytest.raises(QuireError, match="'checkpoint': this checkpoint has none for every layer") as caught:
        scales_of(folder, "checkpoint")
    assert (caught.value.code, caught.value.param) == ("invalid_config", "kv_scales")


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_scale(checkpoint: Checkpoint, bad: float) -> None:
    folder, _ = checkpoint("llama", 0)
    add(folder, **both("k_scale", "v_scale") | {"model__layers__1__self_attn__v_scale": bad})
    with pytest.raises(QuireError, match=r"layers\.1\.self_attn\.v_scale must be above 0"):
        scales_of(folder)
    scales_of(folder, "calibrate")


def test_scales_of_another_storage_are_not_taken(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("llama", 0)
    add(folder, **both("k_scale", "v_scale"))
    config = json.loads((folder / "config.json").read_text())
    for kind, taken in (("int", False), ("float", True)):
        scheme = {"type": kind, "num_bits": 8}
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"kv_cache_scheme": scheme}}))
        assert (checkpoint_scales(folder, LAYERS) is not None) == taken


def test_one_is_said(checkpoint: Checkpoint, caplog: Any) -> None:
    folder, _ = checkpoint("llama", 0)
    assert bool((scales_of(folder, "one") == 1).all())
    assert "values beyond 448 are clipped" in caplog.text


def test_random_weights_have_no_scales_of_a_checkpoint(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("llama", 0)
    with pytest.raises(QuireError, match="random weights have none"):
        scales_of(folder, "checkpoint", dummy=True)


# ---------------------------------------------------------------------------------------------- the whole runner


def test_other_storage_needs_nothing(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("llama", 0)
    model = load(folder)
    pool = pool_of(model, torch.float32)
    set_kv_scales(pool, model, "checkpoint", folder, dummy=False, vocab_size=VOCAB, max_model_len=128)
    assert pool.scales is None


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_runner_sets_the_scales_of_its_cache(load_format: Any) -> None:
    config = Config(max_num_seqs=4, num_kv_blocks=64, block_size=16, kv_dtype="fp8", load_format=load_format)
    phases: dict[str, float] = {}
    runner = load_runner(config, resolve("tiny-chat", max_model_len=256), select("cpu"), Comm(), phases)
    scales = runner._pool.scales
    assert scales is not None
    assert phases["kv_scales"] > 0
    assert bool((scales != 1).all())
    for layer, cache in enumerate(runner._pool.layers):
        assert (cache.k_scale, cache.v_scale) == (scales[layer, 0], scales[layer, 1])
    stream = Stream(list(range(10, 40)), SamplingParams(temperature=0.0), 20)
    Driver(runner, 4, 16).run([stream], 7)
    stored = runner._pool.layers[0].k.view(torch.uint8)
    assert len(stream.output) == 20
    assert bool(stored.any()), "stored in FP8"
    largest = float(runner._pool.layers[0].k.float().abs().max())
    assert 448 / MARGIN / 8 < largest < 448, "most of the range is used, and nothing is clipped"


def test_tiny_chat_says_the_same_with_an_fp8_cache(tmp_path: Path) -> None:
    """Logits of the trained model: e4m3 keys and values cost a few percent, not the answer."""
    folder = shutil.copytree(BUILTIN["tiny-chat"], tmp_path / "tiny")
    model = load(folder)
    info = resolve(str(folder))
    ids = [prompts(folder, info.vocab_size, 64)[0]]

    def set_scales(pool: KVCachePool) -> None:
        set_kv_scales(pool, model, "auto", folder, dummy=False, vocab_size=info.vocab_size, max_model_len=128)

    (want,) = logits_of(model, ids, [9, 1])
    (got,) = logits_of(model, ids, [9, 1], F8, set_scales)
    error = float((got - want).norm() / want.norm())
    assert 0 < error < 0.08, error
    assert float((got.argmax(-1) == want.argmax(-1)).float().mean()) > 0.85
