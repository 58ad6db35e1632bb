"""Every architecture against transformers in float32, logit by logit: whole, chunked, one by one, in company."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from core.errors import QuireError
from tests.models.running import load, logits_of

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama all kv heads": ("llama", {"num_key_value_heads": 4}),
    "llama wide heads": ("llama", {"head_dim": 24}),
    "llama rope linear": ("llama", {"rope": {"rope_type": "linear", "factor": 4.0}}),
    "llama rope llama3": ("llama", {"rope": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "llama rope yarn": (
        "llama",
        {"rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "qwen yarn, attention factor": (
        "qwen3",
        {"rope": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 0.9}},
    ),
    "mistral window": ("mistral", {"sliding_window": 21}),
    "mistral full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 mixed windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
}


def reference(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
        return logits


def with_rope(changes: dict[str, Any]) -> dict[str, Any]:
    changes = dict(changes)
    rope = changes.pop("rope", None)
    return changes | ({"rope_parameters": {"rope_theta": 500.0, **rope}} if rope else {})


@pytest.mark.parametrize("case", CASES)
def test_logits(checkpoint: Callable[..., tuple[Any, Any]], case: str) -> None:
    kind, changes = CASES[case]
    folder, model = checkpoint(kind, seed=random.randrange(1000), **with_rope(changes))
    ours = load(folder)
    rng = random.Random(case)
    # Beyond the window and beyond the original context of the scalings.
    sequences = [[rng.randrange(131) for _ in range(length)] for length in (117, 40, 1)]
    want = [reference(model, ids) for ids in sequences]
    for chunks in ([1000], [7], [30, 1, 1, 11, 1], [1]):
        for got, expected in zip(logits_of(ours, sequences, chunks), want, strict=True):
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(got / scale, expected / scale, atol=1e-4, rtol=0)
    assert float(want[0].std()) > 0.5, "a flat model would hide errors"


def test_dynamic_scaling_is_taken_at_the_longest_length(checkpoint: Callable[..., tuple[Any, Any]]) -> None:
    rope = {"rope_theta": 500.0, "rope_type": "dynamic", "factor": 2.0}
    folder, model = checkpoint("llama", 3, rope_parameters=rope)
    ids = [random.randrange(131) for _ in range(200)]
    (got,) = logits_of(load(folder, num_positions=200), [ids], [50])
    torch.testing.assert_close(got, reference(model, ids), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("served", [32, 100])
def test_longrope_takes_the_factors_of_the_longest_length(
    checkpoint: Callable[..., tuple[Any, Any]], served: int
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "original_max_position_embeddings": 32,
        "factor": 4.0,
        "short_factor": [1.0 + i / 20 for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)],
    }
    folder, model = checkpoint("llama", 4, rope_parameters=rope)
    ids = [random.randrange(131) for _ in range(served)]
    want = reference(model, ids)
    (got,) = logits_of(load(folder, num_positions=served), [ids], [13])
    torch.testing.assert_close(got, want, atol=1e-4 * max(1.0, float(want.abs().max())), rtol=0)


def test_both_spellings_of_rope(checkpoint: Callable[..., tuple[Any, Any]]) -> None:
    rope = {"rope_theta": 700.0, **LLAMA3, "original_max_position_embeddings": 32}
    folder, model = checkpoint("llama", 6, rope_parameters=rope)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    change(folder, rope_parameters=None, rope_theta=700.0, rope_scaling=scaling)
    ids = [random.randrange(131) for _ in range(90)]
    want = reference(model, ids)
    (got,) = logits_of(load(folder), [ids], [90])
    torch.testing.assert_close(got, want, atol=1e-4 * max(1.0, float(want.abs().max())), rtol=0)


def test_sharded_files(checkpoint: Callable[..., tuple[Any, Any]]) -> None:
    folder, model = checkpoint("llama", 1, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ids = [1, 2, 3, 4]
    (got,) = logits_of(load(folder), [ids], [4])
    torch.testing.assert_close(got, reference(model, ids), atol=1e-4, rtol=1e-4)
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(QuireError, match="lacks the weight files model-00002"):
        load(folder)


@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.1), ("int4", 0.8)])
def test_quantised_weights_are_close(
    checkpoint: Callable[..., tuple[Any, Any]], quantization: str, bound: float
) -> None:
    folder, model = checkpoint("llama", 5)
    ids = [random.randrange(131) for _ in range(30)]
    want = reference(model, ids)
    (got,) = logits_of(load(folder, quantization=quantization), [ids], [30])
    error = float((got - want).norm() / want.norm())
    assert 1e-4 < error < bound, "quantised, and well"


def change(folder: Any, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, ["'mamba'", "llama, mistral, qwen2, qwen3"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", "LlamaForCausalLM"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["'gptq'", "'fp8'", "'compressed-tensors'"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "silu"]),
        ({"num_hidden_layers": 4}, ["lacks", "layers.3.attention"]),
        ({"num_hidden_layers": 2}, ["no place for", "model.layers.2."]),
        ({"intermediate_size": 97}, ["mlp.", "96", "97"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "positive integer"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "su"}}, ["'su'", "llama3"]),
        ({"rope_parameters": None, "rope_scaling": "yarn"}, ["rope_scaling", "'yarn'", "object"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, ["'llama3'", "low_freq_factor"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": None}}, ["'yarn'", "factor"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, ["factor", "above 0", "0"]),
        ({"rope_parameters": {"rope_theta": "x"}}, ["rope_theta", "'x'"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, ["rope_parameters", "layers"]),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, ["'longrope'", "short_factor", "8 numbers"]),
        ({"num_key_value_heads": 3}, ["4 heads", "3 K/V heads"]),
        ({"head_dim": 7}, ["7 of 7 dimensions"]),
        ({"architectures": "LlamaForCausalLM"}, ["'LlamaForCausalLM'", "LlamaForCausalLM is"]),
        ({"architectures": [["x"]]}, ["LlamaForCausalLM"]),
        ({"model_type": ["llama"]}, ["['llama']", "llama, mistral"]),
        (
            {
                "model_type": "qwen2",
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["chunked_attention"] * 3,
            },
            ["layer_types", "sliding_attention", "chunked_attention"],
        ),
    ],
)
def test_wrong_checkpoints_in_one_sentence(
    checkpoint: Callable[..., tuple[Any, Any]], changes: dict[str, Any], words: list[str]
) -> None:
    folder, _ = checkpoint("llama", 0)
    change(folder, **changes)
    with pytest.raises(QuireError) as caught:
        load(folder)
    assert caught.value.code == "model_invalid"
    for word in words:
        assert word in caught.value.message


def test_a_broken_weights_file(checkpoint: Callable[..., tuple[Any, Any]]) -> None:
    folder, _ = checkpoint("llama", 0)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(QuireError, match="not a valid safetensors file"):
        load(folder)
