"""Sampling in plain torch: the reference of every other backend's sampler. Works on tensors of any device.

Each stage touches only the rows that ask for it, so the plain case costs nothing and no row's result depends on what
its batch mates want. Finding those rows reads the tensors on the host, which is free on a CPU.
"""

from __future__ import annotations

import torch

from hw.ops import SampleInputs, SampleOutput

_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)  # the same 32 bits as a signed integer


def sample(logits: torch.Tensor, inputs: SampleInputs) -> SampleOutput:
    """One id per row of logits [m, vocab] float32, by the contract of `hw.ops.Ops.sample`. `logits` is left alone."""
    raw = logits
    if inputs.any_bias:
        logits = _biased(logits, inputs.bias_ids, inputs.bias_values)
    if inputs.any_penalty:
        logits = _penalised(logits, inputs)
    ids = torch.argmax(logits, dim=-1)
    if inputs.any_random:
        rows = torch.nonzero(inputs.temperature > 0).squeeze(1)
        if rows.numel() == logits.shape[0]:
            ids = _drawn(logits, inputs, rows)
        elif rows.numel():
            ids[rows] = _drawn(logits[rows], inputs, rows)
    if inputs.num_logprobs is None:
        return SampleOutput(ids)
    return logprobs(raw, ids, inputs.num_logprobs)


def logprobs(logits: torch.Tensor, ids: torch.Tensor, num_top: int) -> SampleOutput:
    """Log-probabilities of ids [m] under logits [m, vocab] float32, with `num_top` alternatives (best first)."""
    # log_softmax goes row by row; a sum over one long row may be split over threads, and then rounds differently.
    values = torch.log_softmax(logits, dim=-1)
    index = ids.long().unsqueeze(1)
    top = torch.topk(logits, min(num_top, logits.shape[1]), dim=-1)
    return SampleOutput(
        ids=ids,
        chosen=values.gather(1, index).squeeze(1),
        rank=(logits > logits.gather(1, index)).sum(dim=-1),
        top_ids=top.indices,
        top_logprobs=values.gather(1, top.indices),
    )


def gumbel_noise(key0: torch.Tensor, key1: torch.Tensor, vocab: int) -> torch.Tensor:
    """Noise [m, vocab] float32 of the keys [m] int32: a counter hash of (key, id), see `hw.ops.Ops.sample`.

    In double precision, because in single u rounds to 1 for one id in 2^24, whose noise would be infinite: at a
    vocabulary of 128k that is one token in 130 drawn blindly.
    """
    ids = torch.arange(vocab, dtype=torch.int32, device=key0.device)
    hashed = _mix(_mix(ids ^ key0.int().unsqueeze(1)) + key1.int().unsqueeze(1))
    u = ((hashed >> 8) & 0xFFFFFF).double().mul_(2.0**-24).add_(2.0**-25)
    return u.log_().neg_().log_().neg_().float()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The contract's 32-bit mix, in int32: products wrap; a shift's sign bits are masked away."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MULTIPLIER_1
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _MULTIPLIER_2
    return x ^ ((x >> 16) & 0xFFFF)


def _drawn(logits: torch.Tensor, inputs: SampleInputs, rows: torch.Tensor) -> torch.Tensor:
    """Ids of the random rows: `logits` [r, vocab] are those of `rows` [r]."""
    # The maximum comes off first: a tiny temperature then gives -inf for the others, never inf - inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / inputs.temperature[rows].unsqueeze(1)
    if inputs.any_truncation:
        _truncate(scaled, inputs.top_k[rows], inputs.top_p[rows], inputs.min_p[rows])
    scaled += gumbel_noise(inputs.key0[rows], inputs.key1[rows], logits.shape[1])
    return torch.argmax(scaled, dim=-1)


def _truncate(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> None:
    """Set what top_k, then top_p, then min_p exclude to -inf, in place. scaled [r, vocab] has maximum 0 per row."""
    vocab = scaled.shape[1]
    sorting = torch.nonzero(((top_k > 0) & (top_k < vocab)) | (top_p < 1)).squeeze(1)
    if sorting.numel():
        # Stable: of equal logits the lowest id goes first, so that exactly k stay.
        values, order = torch.sort(scaled[sorting], dim=-1, descending=True, stable=True)
        k = torch.where(top_k[sorting] > 0, top_k[sorting], vocab).unsqueeze(1)
        values.masked_fill_(torch.arange(vocab, device=scaled.device) >= k, -torch.inf)
        p = top_p[sorting].unsqueeze(1)
        probs = torch.softmax(values, dim=-1)
        before = probs.cumsum(dim=-1) - probs
        # A token stays while those before it do not reach p; the first one always does.
        outside = (before >= p) & (p < 1)
        outside[:, 0] = False
        values.masked_fill_(outside, -torch.inf)
        scaled[sorting] = torch.empty_like(values).scatter_(1, order, values)
    floor = torch.nonzero(min_p > 0).squeeze(1)
    if floor.numel():
        # p(id) >= min_p * max p, and the maximum of the scaled logits is 0.
        kept = scaled[floor]
        kept.masked_fill_(kept < torch.log(min_p[floor]).unsqueeze(1), -torch.inf)
        scaled[floor] = kept


def _biased(logits: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """logits plus bias values [m, k] at ids [m, k] (-1: none); ids may repeat (a ban on top of a bias)."""
    used = ids >= 0
    return logits.scatter_add(1, ids.clamp(min=0).long(), torch.where(used, values, 0.0))


def _penalised(logits: torch.Tensor, inputs: SampleInputs) -> torch.Tensor:
    """Repetition over prompt and output, then frequency and presence over output tokens."""
    asks = (inputs.repetition != 1) | (inputs.frequency != 0) | (inputs.presence != 0)
    rows = torch.nonzero(asks).squeeze(1)
    if rows.numel() == 0:
        return logits
    lens = inputs.lens[rows].unsqueeze(1)
    longest = int(lens.max())
    tokens = inputs.token_ids[:, :longest][inputs.state_rows[rows].long()].long()
    places = torch.arange(longest, device=logits.device)
    is_output = (places >= inputs.prompt_lens[rows].unsqueeze(1)) & (places < lens)
    picked = logits[rows]
    tokens.masked_fill_(places >= lens, 0)  # whatever an earlier owner of the row left there
    counts = torch.zeros_like(picked).scatter_add_(1, tokens, is_output.to(picked.dtype))
    seen = torch.zeros_like(picked).scatter_add_(1, tokens, (places < lens).to(picked.dtype)) > 0
    repetition = inputs.repetition[rows].unsqueeze(1)
    repeated = torch.where(picked > 0, picked / repetition, picked * repetition)
    picked = torch.where(seen, repeated, picked)
    picked = picked - inputs.frequency[rows].unsqueeze(1) * counts
    picked = picked - inputs.presence[rows].unsqueeze(1) * (counts > 0).to(picked.dtype)
    result = logits.clone()
    result[rows] = picked
    return result
