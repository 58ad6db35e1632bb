"""Ready-made FP8 checkpoints and a calibrated FP8 cache on a GPU, against the CPU's float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from core.config import Config
from core.messages import Batch, NewSequence, RowBlocks, Scheduled
from core.model_info import ModelInfo
from hw.comm import Comm
from hw.select import select
from models.layers.linear import Linear
from models.runtime.build import load_runner, load_weights
from quire import SamplingParams
from tests.models.fp8_checkpoints import compressed, convert, group, per_block, per_channel, per_tensor

pytestmark = pytest.mark.gpu

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, DIM = 512, 512, 1024, 3, 8, 2, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": DIM, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
FORMATS: dict[str, tuple[dict[str, Any], Any, int]] = {
    "channel": (compressed(group_0=group("channel")), per_channel, 0),
    "tensor": (compressed(group_0=group("tensor", dynamic=False)), per_tensor, 0),
    "block": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, per_block(128), 128),
}


def make(folder: Path) -> Path:
    """A plain checkpoint with random weights."""
    torch.manual_seed(0)
    q, kv, mlp = (HEADS * DIM, HIDDEN), (KV_HEADS * DIM, HIDDEN), (INNER, HIDDEN)
    shapes = {"q": q, "k": kv, "v": kv, "o": q[::-1], "gate": mlp, "up": mlp, "down": mlp[::-1]}
    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}
    tensors["lm_head.weight"] = torch.randn(VOCAB, HIDDEN) / 8
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, shape in shapes.items():
            inside = "self_attn" if name in "qkvo" else "mlp"
            tensors[f"{at}{inside}.{name}_proj.weight"] = torch.randn(shape) * 1.5 / shape[1] ** 0.5
        for name in "qk":  # sharp attention turns any rounding into another answer
            tensors[f"{at}self_attn.{name}_proj.weight"] /= 3
        tensors[f"{at}self_attn.v_proj.weight"] *= 500  # beyond e4m3 without a scale
        tensors[f"{at}self_attn.o_proj.weight"] /= 500
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = torch.rand(HIDDEN) + 0.5
    plain = folder / "plain"
    plain.mkdir()
    save_file(tensors, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(CONFIG))
    return plain


def logits(folder: Path, device: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits of the last token of a prompt in two chunks and three decodes, each in one step; scales of the cache."""
    config = Config(device=device, max_num_seqs=4, max_step_tokens=64, num_kv_blocks=32, block_size=16, **options)
    info = ModelInfo(str(folder), "x", "0", "llama", [], VOCAB, 256, [])
    runner = load_runner(config, info, select(device), Comm())
    ids = [(7 * i * i + 3 * i) % VOCAB for i in range(60)]
    rows = []
    for start, count in ((0, 33), (33, 24), (57, 1), (58, 1), (59, 1)):
        new = [NewSequence(0, 0, ids, [], SamplingParams())] if not start else []
        blocks = [RowBlocks(0, 0, 0, [5, 9, 2, 7])] if not start else []
        runner.forward(Batch("", 0, [Scheduled(0, start, count, sample=True)], new, [], blocks))
        assert runner._current is not None
        assert runner._current.logits is not None
        rows.append(runner._current.logits[0].float().cpu().clone())
        # Nothing is drawn: a drawn token would take the place of the prompt's next one.
    scales = runner._pool.scales
    return torch.stack(rows), None if scales is None else scales.cpu()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", FORMATS)
def test_ready_made_checkpoints(tmp_path: Path, name: str) -> None:
    settings, quantise, size = FORMATS[name]
    ready, dequantised = convert(
        make(tmp_path), settings, quantise, ("lm_head",), size=size,
        scale_name="weight_scale_inv" if size else "weight_scale",
    )  # fmt: skip
    info = ModelInfo(str(ready), "x", "0", "llama", [], VOCAB, 256, [])
    on_gpu = load_weights(Config(device="cuda"), info, select("cuda"), Comm())
    on_cpu = load_weights(Config(device="cpu"), info, select("cpu"), Comm())
    for weight_name, weight in on_gpu.parts.weights.items():
        other = on_cpu.parts.weights[weight_name]
        if isinstance(weight, Linear) and isinstance(other, Linear):
            values, scale = (tensor.cpu().float() for tensor in weight._packed)
            exact = values * scale[:, None]
            assert error(exact, other._packed[0]) < 0.035 if size else torch.equal(exact, other._packed[0])
    want, _ = logits(dequantised, "cpu")
    got, _ = logits(ready, "cuda")
    same_way, _ = logits(dequantised, "cuda", quantization="fp8")
    print(name, "error of the logits:", error(got, want), "packed while loading:", error(same_way, want))
    # e4m3 activations alone cost 6 %; scales per block add the second rounding of the weights.
    assert error(got, want) < (0.13 if size else 0.1)


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_calibrated_cache(tmp_path: Path, quantization: Any, load_format: Any) -> None:
    folder = make(tmp_path)
    options = {"quantization": quantization, "load_format": load_format}
    plain, none = logits(folder, "cuda", **options)
    got, scales = logits(folder, "cuda", kv_dtype="fp8", **options)
    ones, one = logits(folder, "cuda", kv_dtype="fp8", kv_scales="one", **options)
    assert none is None
    assert scales is not None
    assert one is not None
    assert bool((one == 1).all())
    print(quantization, load_format, "calibrated:", error(got, plain), "1.0:", error(ones, plain), scales.tolist())
    assert error(got, plain) < 0.12
    if load_format == "auto":
        assert error(ones, plain) > 2 * error(got, plain), "values of some 2,000 are clipped at 448"
        _, want = logits(folder, "cpu", kv_dtype="fp8")
        assert want is not None
        torch.testing.assert_close(scales, want, rtol=0.15 if quantization == "fp8" else 0.03, atol=0)
