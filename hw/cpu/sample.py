"""Sampling in plain torch: the reference of every other backend's sampler. Works on tensors of any device.

Each stage touches only the rows that ask for it, so the plain case costs nothing and no row's result depends on what
its batch mates want. Finding those rows reads the tensors on the host, which is free on a CPU.
"""

from __future__ import annotations

import torch

from hw.ops import SampleInputs, SampleOutput

CANDIDATES = 256  # finding so many of the largest costs a tenth of sorting a vocabulary, and nearly always decides
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)  # the same 32 bits as a signed integer
# [256, 8]: what the bits of a byte, the lowest first, add to eight logits.
_ADDENDS = torch.where(torch.arange(256)[:, None] >> torch.arange(8) & 1 == 1, 0.0, -torch.inf)


def sample(logits: torch.Tensor, inputs: SampleInputs) -> SampleOutput:
    """One id per row of logits [m, vocab], by the contract of `hw.ops.Ops.sample`. `logits` is left alone."""
    raw = logits.float()
    logits = constrained(raw, inputs)
    if inputs.any_bias:
        logits = _biased(logits, inputs.bias_ids, inputs.bias_values)
    if inputs.any_penalty:
        logits = _penalised(logits, inputs)
    rows = torch.nonzero(inputs.temperature > 0).squeeze(1) if inputs.any_random else None
    if rows is not None and rows.numel() == logits.shape[0]:
        ids = _drawn(logits, inputs, rows)
    else:
        ids = torch.argmax(logits, dim=-1)
        if rows is not None and rows.numel():
            ids[rows] = _drawn(logits[rows], inputs, rows)
    if inputs.num_logprobs is None:
        return SampleOutput(ids)
    return logprobs(raw, ids, inputs.num_logprobs)


def constrained(logits: torch.Tensor, inputs: SampleInputs) -> torch.Tensor:
    """logits with what the rows' grammars do not allow at -inf; waits for no device. `logits` is left alone."""
    if inputs.allowed is None or inputs.allowed_rows is None:
        return logits
    # A byte of the mask at a time, as eight addends from a table: shifting bits out takes ten times as long on a CPU.
    table = _ADDENDS.to(logits.device, logits.dtype, non_blocking=True)
    addends = table.index_select(0, inputs.allowed.view(torch.uint8).flatten().int())
    return logits.index_add(0, inputs.allowed_rows, addends.view(len(inputs.allowed), -1)[:, : logits.shape[1]])


def logprobs(logits: torch.Tensor, ids: torch.Tensor, num_top: int) -> SampleOutput:
    """Log-probabilities of ids [m] under logits [m, vocab], with `num_top` alternatives (best first)."""
    # log_softmax goes row by row; a sum over one long row may be split over threads, and then rounds differently.
    logits = logits.float()
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

    Above one half, log(u) is taken as log1p(-(1 - u)): in single precision u itself would round to 1 for one id in
    2^24, whose noise would be infinite: at a vocabulary of 128k, one token in 130 would be drawn blindly.
    """
    ids = torch.arange(vocab, dtype=torch.int32, device=key0.device)
    hashed = _mix(_mix(ids ^ key0.int().unsqueeze(1)).add_(key1.int().unsqueeze(1)))
    k = hashed.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    # k or its mirror image 2^24 - 1 - k, whichever is below 2^23, so that + 0.5 is exact.
    w = torch.minimum(k, 0xFFFFFF - k).float().add_(0.5).mul_(2.0**-24)
    # lerp by 0 or 1 selects exactly; torch.where takes ten times as long on a CPU.
    return torch.lerp(w.log(), w.neg().log1p_(), (k >> 23).float()).neg_().log_().neg_()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The contract's 32-bit mix, in place on an int32 tensor: products wrap, a shift's sign bits are masked."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_MULTIPLIER_1)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_MULTIPLIER_2)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


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
    k = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    rows = torch.nonzero((k < vocab) | (top_p < 1)).squeeze(1)
    if rows.numel():
        # Before min_p, which leaves the order and the probabilities of what it keeps alone, so any order would do.
        scaled[rows] = _keep_first(scaled[rows], k[rows].unsqueeze(1), top_p[rows].unsqueeze(1), CANDIDATES)
    rows = torch.nonzero(min_p > 0).squeeze(1)
    if rows.numel():
        # p(id) >= min_p * max p, and the maximum of the scaled logits is 0.
        kept = scaled[rows]
        scaled[rows] = kept.masked_fill_(kept < torch.log(min_p[rows]).unsqueeze(1), -torch.inf)


def _keep_first(scaled: torch.Tensor, k: torch.Tensor, p: torch.Tensor, num_candidates: int) -> torch.Tensor:
    """scaled [r, vocab] with all but the first ids of each row at -inf: those of top_k, then of top_p.

    Looks at the `num_candidates` largest only. A row that they do not decide is done again with all; as only their
    sorted values and sums from the largest on matter, both ways give the same result.
    """
    vocab = scaled.shape[1]
    size = min(num_candidates, vocab)
    probs = torch.softmax(scaled, dim=-1)
    values, order = torch.topk(scaled, size, dim=-1)
    cumulated = probs.gather(1, order).cumsum(dim=-1)
    # The whole of what top_k leaves; without top_k it is 1.
    whole = torch.where(k < vocab, cumulated.gather(1, k.clamp(max=size).long() - 1), 1.0)
    decided = ((k <= size) | (cumulated[:, -1:] >= p * whole) & (k == vocab)).squeeze(1)
    if size < vocab and not bool(decided.all()):
        result = torch.empty_like(scaled)
        result[decided] = _keep_first(scaled[decided], k[decided], p[decided], size)
        late = ~decided
        result[late] = _keep_first(scaled[late], k[late], p[late], vocab)
        return result
    # A token stays while those before it do not reach p; the first one always does.
    before = torch.nn.functional.pad(cumulated[:, :-1], (1, 0))
    inside = (torch.arange(size, device=scaled.device) < k) & ((before < p * whole) | (p >= 1))
    count = inside.sum(dim=-1, keepdim=True).clamp(min=1)
    last = values.gather(1, count - 1)
    keep = scaled >= last
    if bool((keep.sum(dim=-1, keepdim=True) > count).any()):
        # Of ids that equal the last one, the lowest stay, so that exactly `count` do.
        equal = scaled == last
        room = count - (scaled > last).sum(dim=-1, keepdim=True)
        keep = (scaled > last) | (equal & (equal.cumsum(dim=-1) <= room))
    return scaled.masked_fill(~keep, -torch.inf)


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
