"""What a model launches on its device, run through once: for a device that compiles kernels ahead of their launch."""

from __future__ import annotations

from core.messages import Batch, NewSequence, Scheduled
from models.layers.decoder import Decoder
from models.runtime.runner import ModelRunner
from quire import SamplingParams

EVERY_ROWS = 32  # up to here each number of rows is its own; above, 5 apart meets every alignment and every split


def keep_kinds(model: Decoder) -> None:
    """Drop the layers that are like an earlier one. Scales of a cache lie 8 bytes apart, and kernels are compiled for
    addresses divisible by 16: of every kind an even and an odd layer are left."""
    kinds = {(layer.attention.kv, index % 2): layer for index, layer in reversed(list(enumerate(model.layers)))}
    kept = set(map(id, kinds.values()))
    model.layers = [layer for layer in model.layers if id(layer) in kept]


def every_launch(runner: ModelRunner, max_num_seqs: int) -> None:
    """Steps that draw for any number of rows, greedily and at random. The passes of the model are captured already."""
    counts = [*range(1, min(EVERY_ROWS, max_num_seqs) + 1), *range(EVERY_ROWS + 1, max_num_seqs + 1, 5), max_num_seqs]
    for temperature in (0.0, 1.0):
        sampling = SamplingParams(temperature=temperature)
        new = [NewSequence(row, 0, [0, 0], [], sampling) for row in range(max_num_seqs)]
        for count in counts:
            scheduled = [Scheduled(row, 1, 1, sample=True) for row in range(count)]
            runner.forward(Batch("", 0, scheduled, new))
            runner.sample()
            new = []
