"""hw/cpu/sample.py against plain Python, one row and one id at a time."""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from hw.cpu.sample import CANDIDATES, _truncate, gumbel_noise, logprobs, sample
from hw.ops import SampleInputs

BITS = 0xFFFFFFFF


@dataclass
class Row:
    """One row's parameters, as the reference reads them."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    key0: int = 0
    key1: int = 0
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    bias: dict[int, float] = field(default_factory=dict)


def pack(rows: list[Row], num_logprobs: int | None = None) -> SampleInputs:
    """SampleInputs of the rows; state rows are shuffled, and the state table holds rubbish past each sequence."""
    m = len(rows)
    state_rows = random.Random(m).sample(range(m + 3), m)
    longest = max([len(row.prompt) + len(row.output) for row in rows] + [1]) + 2
    token_ids = torch.full((m + 3, longest), 1, dtype=torch.int32)
    width = max([len(row.bias) for row in rows] + [1])
    bias_ids = torch.full((m, width), -1, dtype=torch.int32)
    bias_values = torch.zeros(m, width)
    for i, row in enumerate(rows):
        known = row.prompt + row.output
        token_ids[state_rows[i], : len(known)] = torch.tensor(known, dtype=torch.int32)
        for j, (token, value) in enumerate(row.bias.items()):
            bias_ids[i, j] = token
            bias_values[i, j] = value

    def floats(name: str) -> torch.Tensor:
        return torch.tensor([getattr(row, name) for row in rows], dtype=torch.float32)

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(np.array(values, dtype=np.int64).astype(np.int32))

    return SampleInputs(
        temperature=floats("temperature"),
        top_k=ints([row.top_k for row in rows]),
        top_p=floats("top_p"),
        min_p=floats("min_p"),
        presence=floats("presence"),
        frequency=floats("frequency"),
        repetition=floats("repetition"),
        key0=ints([row.key0 for row in rows]),
        key1=ints([row.key1 for row in rows]),
        token_ids=token_ids,
        state_rows=ints(state_rows),
        prompt_lens=ints([len(row.prompt) for row in rows]),
        lens=ints([len(row.prompt) + len(row.output) for row in rows]),
        bias_ids=bias_ids,
        bias_values=bias_values,
        any_random=any(row.temperature > 0 for row in rows),
        any_truncation=any(row.top_k or row.top_p < 1 or row.min_p for row in rows),
        any_penalty=any(row.presence or row.frequency or row.repetition != 1 for row in rows),
        any_bias=any(row.bias for row in rows),
        num_logprobs=num_logprobs,
    )


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & BITS
    x ^= x >> 15
    x = x * 0x846CA68B & BITS
    return x ^ (x >> 16)


def noise(key0: int, key1: int, token: int) -> float:
    hashed = mix((mix(token ^ (key0 & BITS)) + (key1 & BITS)) & BITS)
    return -math.log(-math.log((hashed >> 8) * 2.0**-24 + 2.0**-25))


def adjusted(logits: list[float], row: Row) -> list[float]:
    """The logits after bias and penalties."""
    values = [value + row.bias.get(token, 0.0) for token, value in enumerate(logits)]
    for token in range(len(values)):
        if token in row.prompt or token in row.output:
            values[token] = values[token] / row.repetition if values[token] > 0 else values[token] * row.repetition
        count = row.output.count(token)
        values[token] -= row.frequency * count + (row.presence if count else 0.0)
    return values


def allowed(values: list[float], row: Row) -> set[int]:
    """The ids that top_k, top_p and min_p leave."""
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    if row.top_k:
        order = order[: row.top_k]
    weights = [math.exp((values[token] - values[order[0]]) / row.temperature) for token in order]
    total = sum(weights)
    kept: set[int] = set()
    cumulated = 0.0
    for token, weight in zip(order, weights, strict=True):
        if row.top_p < 1 and cumulated >= row.top_p and kept:
            break
        cumulated += weight / total
        if weight >= row.min_p:
            kept.add(token)
    return kept


def expected(logits: list[float], row: Row) -> int:
    values = adjusted(logits, row)
    if row.temperature == 0:
        return max(range(len(values)), key=lambda token: (values[token], -token))
    kept = allowed(values, row)
    return max(kept, key=lambda token: values[token] / row.temperature + noise(row.key0, row.key1, token))


def some_row(rng: random.Random, vocab: int) -> Row:
    """A row that uses each feature about half of the time."""

    def maybe(value: float, off: float) -> float:
        return value if rng.random() < 0.5 else off

    return Row(
        temperature=maybe(rng.uniform(0.2, 2.0), 0.0) if rng.random() < 0.5 else rng.uniform(0.2, 2.0),
        top_k=int(maybe(rng.randint(1, vocab), 0)),
        top_p=maybe(rng.uniform(0.1, 0.99), 1.0),
        min_p=maybe(rng.uniform(0.01, 0.5), 0.0),
        presence=maybe(rng.uniform(-2, 2), 0.0),
        frequency=maybe(rng.uniform(-2, 2), 0.0),
        repetition=maybe(rng.uniform(0.5, 2), 1.0),
        key0=rng.getrandbits(32),
        key1=rng.getrandbits(32),
        prompt=[rng.randrange(vocab) for _ in range(rng.randint(1, 9))],
        output=[rng.randrange(vocab) for _ in range(rng.randint(0, 9))],
        bias={t: rng.choice([-math.inf, rng.uniform(-5, 5)]) for t in rng.sample(range(vocab), rng.randint(0, 4))},
    )


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    vocab = rng.choice([17, 61, 200])
    rows = [some_row(rng, vocab) for _ in range(rng.randint(1, 9))]
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(seed)) * 3
    before = logits.clone()
    ids = sample(logits, pack(rows)).ids.tolist()
    assert ids == [expected(line, row) for line, row in zip(before.tolist(), rows, strict=True)]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("seed", range(10))
def test_no_row_depends_on_its_batch_mates(seed: int) -> None:
    rng = random.Random(seed)
    vocab = 300
    rows = [some_row(rng, vocab) for _ in range(8)]
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    together = sample(logits, pack(rows, 5))
    for i, row in enumerate(rows):
        alone = sample(logits[i : i + 1], pack([row], 5))
        for name in ("ids", "chosen", "rank", "top_ids", "top_logprobs"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), name


def test_noise_equals_the_reference_and_is_finite() -> None:
    keys = torch.tensor([3, -7, 2**31 - 1], dtype=torch.int32)
    got = gumbel_noise(keys, keys.flip(0), 5000)
    assert got.isfinite().all()
    for i in range(3):
        wanted = [noise(int(keys[i]), int(keys.flip(0)[i]), token) for token in range(5000)]
        np.testing.assert_allclose(got[i].numpy(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 6, 1.0), (1.3, 0, 0.8)])
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    """Chi-square over 20,000 fixed keys; the bound is the 99.9 % quantile of 11 degrees of freedom."""
    vocab, draws = 12, 20_000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(5))
    rng = np.random.default_rng(1)
    row = Row(temperature=temperature, top_k=top_k, top_p=top_p, prompt=[0])
    one = pack([row])
    many = dataclasses.replace(
        one,
        **{
            name: getattr(one, name).expand(draws)
            for name in ("temperature", "top_k", "top_p", "min_p", "presence", "frequency", "repetition")
        },
        key0=torch.tensor(rng.integers(-(2**31), 2**31, draws, dtype=np.int32)),
        key1=torch.tensor(rng.integers(-(2**31), 2**31, draws, dtype=np.int32)),
    )
    ids = sample(logits.expand(draws, vocab).contiguous(), many).ids
    counts = torch.bincount(ids, minlength=vocab).tolist()
    kept = allowed(logits.tolist(), row)
    weights = [math.exp(float(logits[token]) / temperature) if token in kept else 0.0 for token in range(vocab)]
    wanted = [draws * weight / sum(weights) for weight in weights]
    assert all(count == 0 for count, want in zip(counts, wanted, strict=True) if want == 0)
    chi_square = sum((count - want) ** 2 / want for count, want in zip(counts, wanted, strict=True) if want)
    assert chi_square < 31.3


def test_greedy_takes_the_lowest_of_equals_and_top_k_keeps_exactly_k() -> None:
    logits = torch.zeros(1, 50)
    assert sample(logits, pack([Row()])).ids.tolist() == [0]
    drawn = {int(sample(logits, pack([Row(1.0, top_k=3, key0=k, key1=9)])).ids) for k in range(200)}
    assert drawn == {0, 1, 2}


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)) * 10
    ids = sample(logits, pack([Row(1e-30, top_p=0.5, key0=k) for k in range(4)])).ids
    assert torch.equal(ids, logits.argmax(-1))


def test_bans_hold_and_never_touch_the_log_probabilities() -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(2))
    best = int(logits[0].argmax())
    out = sample(logits, pack([Row(bias={best: -math.inf}), Row(bias={7: 100.0})], 3))
    assert out.ids[0] != best
    assert out.ids[1] == 7
    assert out.chosen is not None
    assert out.rank is not None
    assert out.top_ids is not None
    reference = torch.log_softmax(logits, -1)
    torch.testing.assert_close(out.chosen, reference.gather(1, out.ids.unsqueeze(1)).squeeze(1))
    assert out.rank[0] == 1
    assert out.top_ids[0, 0] == best


def test_logprobs_of_given_ids() -> None:
    logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([0, 63, 5, 7, 9])
    out = logprobs(logits, ids, 4)
    reference = torch.log_softmax(logits.double(), -1)
    for i in range(5):
        ordered = sorted(range(64), key=lambda token: -float(logits[i, token]))
        assert out.rank is not None
        assert out.top_ids is not None
        assert out.top_logprobs is not None
        assert out.chosen is not None
        assert int(out.rank[i]) == ordered.index(int(ids[i]))
        assert out.top_ids[i].tolist() == ordered[:4]
        torch.testing.assert_close(out.top_logprobs[i].double(), reference[i, ordered[:4]], rtol=1e-5, atol=1e-5)
        assert math.isclose(float(out.chosen[i]), float(reference[i, ids[i]]), abs_tol=1e-5)
    assert logprobs(logits, ids, 0).top_ids.shape == (5, 0)  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(4))
def test_truncation_of_a_large_vocabulary(seed: int) -> None:
    """Flat rows, which the first candidates do not decide, stand beside peaked ones; many logits are equal."""
    rng = random.Random(seed)
    vocab = 900
    rows = [
        Row(1.0, top_k=rng.choice([0, 5, 255, 256, 257, 600]), top_p=rng.choice([1.0, 0.3, 0.9, 0.99]), key0=k, key1=k)
        for k in range(24)
    ]
    logits = torch.randn(24, vocab, generator=torch.Generator().manual_seed(seed))
    logits[::2] *= 6
    logits[::3] = logits[::3].round()
    kept = [allowed(line, row) for line, row in zip(logits.tolist(), rows, strict=True)]
    scaled = logits - logits.amax(-1, keepdim=True)
    inputs = pack(rows)
    _truncate(scaled, inputs.top_k, inputs.top_p, inputs.min_p)
    for line, wanted in zip(scaled, kept, strict=True):
        got = set(line.isfinite().nonzero()[:, 0].tolist())
        # The reference sums in another order: the last token may fall on either side.
        assert len(got ^ wanted) <= 1
    assert sum(len(line.isfinite().nonzero()) for line in scaled) == pytest.approx(sum(map(len, kept)), abs=3)
    assert any(len(wanted) > CANDIDATES for wanted in kept)


def test_top_k_alone_keeps_exactly_k_of_equals() -> None:
    scaled = torch.zeros(3, 700)
    k = torch.tensor([1, 300, 256], dtype=torch.int32)
    _truncate(scaled, k, torch.ones(3), torch.zeros(3))
    assert [line.isfinite().nonzero()[:, 0].tolist() for line in scaled] == [list(range(n)) for n in (1, 300, 256)]


def test_only_allowed_ids_of_constrained_rows() -> None:
    """Masks beyond a whole number of words, with every stage, for some rows of many; the others are as without."""
    rng = random.Random(7)
    vocab, rows = 77, 12
    logits = torch.tensor([[rng.gauss(0, 3) for _ in range(vocab)] for _ in range(rows)])
    params = [
        Row(i % 3 * 0.7, i % 4 * 5, 1 - i % 2 * 0.3, i % 2 * 0.05, repetition=1 + i % 2, key0=i, key1=9, prompt=[1, 2])
        for i in range(rows)
    ]
    plain = pack(params, num_logprobs=2)
    sets = {i: set(rng.sample(range(vocab), k)) | extra for i, k, extra in [(0, 1, {76}), (4, 3, {31}), (11, 1, set())]}
    masks = np.zeros((len(sets), 3), dtype=np.uint32)
    for line, ids in zip(masks, sets.values(), strict=True):
        for token in ids:
            line[token // 32] |= np.uint32(1 << token % 32)
    constrained = dataclasses.replace(
        plain,
        allowed=torch.from_numpy(masks.view(np.int32)),
        allowed_rows=torch.tensor(list(sets), dtype=torch.int32),
    )
    before = logits.clone()
    free, bound = sample(logits, plain), sample(logits, constrained)
    assert torch.equal(logits, before)
    for row in range(rows):
        if row in sets:
            assert int(bound.ids[row]) in sets[row]
            assert bound.chosen is not None
            expected = torch.log_softmax(logits[row], dim=-1)[bound.ids[row]]
            assert torch.allclose(bound.chosen[row], expected)
        else:
            assert int(bound.ids[row]) == int(free.ids[row])
    (greedy,) = (i for i in sets if params[i].temperature == 0 and params[i].repetition == 1)
    assert int(bound.ids[greedy]) == max(sets[greedy], key=lambda token: float(logits[greedy, token]))
