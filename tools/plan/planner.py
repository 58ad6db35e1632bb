"""Planner: a model, a load and a GPU to a PlanReport."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace

from msgspec.structs import replace as struct_replace

from core.config import Config
from models.layers.weight_sizes import PACKED
from tools.plan.cost import Prices, cost_of
from tools.plan.efficiency import Efficiency, Measured, summary
from tools.plan.gpus import Catalogue, Gpu
from tools.plan.limit import Limit, Load, limit_of
from tools.plan.memory import RESERVED_BYTES, Memory, memory_of
from tools.plan.model import ITEMSIZE, KVStored, PlannedModel, Share
from tools.plan.report import (
    SCHEMA_VERSION,
    ExpectedReport,
    FitReport,
    LimitReport,
    LoadReport,
    MemoryReport,
    ModelReport,
    PlanReport,
    Report,
    Status,
)

SIZES = (1, 2, 4, 8)  # GPUs of one machine, which is what a model can be spread over
MOST_INSTEAD = 3


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of one plan. quantization, kv_dtype: as of `quire serve`, or "auto"."""

    gpu: str
    ranks: int
    quantization: str = "auto"
    kv_dtype: str = "auto"


class Planner:
    """Answers for one model under one load.

    Args:
        argument: what `quire serve` is to be given as the model.
        used_share: --gpu-memory-utilization.
    """

    def __init__(self, model: PlannedModel, argument: str, load: Load, used_share: float) -> None:
        self.model = model
        self.load = load
        self._argument = argument
        self._used_share = used_share
        self._catalogue = Catalogue.read()
        self._measured = Measured.read(self._catalogue)
        self._efficiency = Efficiency.fit(self._measured.half(True))
        held_out = self._measured.half(False)
        self._rate_errors = summary(self._efficiency.step_errors(held_out))
        self._ttft_errors = summary(self._efficiency.ttft_errors(held_out))

    def report(self, wishes: list[Wish], prices: dict[str, Prices]) -> Report:
        """All plans, in the order of the wishes. prices: by GPU."""
        half = self._measured.half
        return Report(
            schema_version=SCHEMA_VERSION,
            model=self._model_report(),
            load=LoadReport(self.load.concurrency, self.load.prompt_tokens, self.load.output_tokens),
            gpu_memory_utilization=self._used_share,
            fit=FitReport(
                gpu=self._measured.gpu,
                date=self._measured.date,
                loads_fitted=len(half(True)),
                loads_held_out=len(half(False)),
                tokens_per_s_mean_error=self._rate_errors.mean,
                tokens_per_s_largest_error=self._rate_errors.largest,
                ttft_mean_error=self._ttft_errors.mean,
                ttft_largest_error=self._ttft_errors.largest,
            ),
            plans=[self.plan(wish, prices.get(wish.gpu)) for wish in wishes],
        )

    def plan(self, wish: Wish, prices: Prices | None = None) -> PlanReport:
        """One of them."""
        gpu = self._catalogue.find(wish.gpu)
        quantization, kv = self._precision(wish, gpu)
        plan = PlanReport(
            gpu=wish.gpu,
            name=gpu.name,
            gpus=wish.ranks,
            quantization=quantization,
            kv_dtype=kv.name,
            status="impossible",
            measured=gpu.measured and wish.ranks == 1,
            notes=[gpu.note] if gpu.note else [],
        )
        try:
            share = self._share(wish, gpu)
        except ValueError as error:
            return struct_replace(plan, reason=str(error), instead=self._instead(wish))
        memory = self._memory(share, gpu)
        status, reason = self._status(memory, gpu)
        limit = limit_of(share, self._catalogue.rates(gpu), self._load_of(memory))
        plan = struct_replace(
            plan,
            status=status,
            reason=reason,
            instead=[] if status == "fits" else self._instead(wish),
            memory=MemoryReport(
                total_bytes=memory.total_bytes,
                reserved_bytes=RESERVED_BYTES,
                weights_bytes=memory.weights_bytes,
                kv_bytes_per_token=share.kv_bytes_per_token,
                kv_bytes=memory.kv_bytes,
                kv_tokens=memory.tokens,
                sequences=memory.sequences,
            ),
        )
        if status == "too_small":
            return plan
        expected = self._expected(share, limit, memory)
        if expected.tokens_per_s > self._measured.stack_tokens_per_s:
            most = f"{self._measured.stack_tokens_per_s:,.0f} tokens/s"
            note = f"the rest of the stack was measured up to {most} only, on two CPU cores"
            plan = struct_replace(plan, notes=[*plan.notes, note])
        return struct_replace(
            plan,
            command=self._command(wish, quantization, kv) if gpu.served else "",
            limit=LimitReport(
                tokens_per_s=expected.concurrency / limit.step,
                step_s=limit.step,
                bound=limit.bound,
                seconds={name: getattr(limit, name) for name in ("products", "head", "kv", "attention", "link")},
            ),
            expected=expected,
            cost=None if prices is None else cost_of(prices, wish.ranks, expected.tokens_per_s, self.load),
        )

    # ------------------------------------------------------------------------------------------ parts of a plan

    def _precision(self, wish: Wish, gpu: Gpu) -> tuple[str, KVStored]:
        """What "auto" becomes, as in the worker."""
        quantization = wish.quantization
        if quantization == "auto":
            quantization = "fp8" if self.model.stores_fp8 and gpu.fp8_tflops is not None else "none"
        return quantization, KVStored["bfloat16" if wish.kv_dtype == "auto" else wish.kv_dtype]

    def _share(self, wish: Wish, gpu: Gpu) -> Share:
        """Raises ValueError saying why there can be none."""
        quantization, kv = self._precision(wish, gpu)
        for option, value in (("--quantization", quantization), ("--kv-dtype", kv.name)):
            if value == "fp8" and gpu.fp8_tflops is None:
                raise ValueError(f"{option} fp8: the {gpu.name} has no FP8")
        return Share.build(self.model, wish.ranks, quantization, kv)

    def _memory(self, share: Share, gpu: Gpu) -> Memory:
        return memory_of(share, gpu.memory_bytes, self._used_share, self.load, self.model.max_model_len)

    def _load_of(self, memory: Memory) -> Load:
        """What runs at once."""
        return replace(self.load, concurrency=max(1, min(self.load.concurrency, memory.sequences)))

    def _status(self, memory: Memory, gpu: Gpu) -> tuple[Status, str]:
        wanted, gib = self.load.concurrency, 2**30
        if memory.sequences == 0:
            weights, total = memory.weights_bytes / gib, memory.total_bytes / gib
            if memory.tokens == 0:
                return "too_small", f"{weights:,.1f} GiB of weights per GPU do not fit into {total:,.1f} GiB"
            return "too_small", (
                f"the cache holds {memory.tokens:,} tokens beside {weights:,.1f} GiB of weights; "
                f"one sequence of the load has {self.load.total_tokens:,}"
            )
        if memory.sequences < wanted:
            return "fewer", f"{memory.sequences:,} of {wanted:,} sequences at once; the others wait"
        return "fits", ""

    def _expected(self, share: Share, limit: Limit, memory: Memory) -> ExpectedReport:
        load, layers, efficiency = self._load_of(memory), share.weights.num_layers, self._efficiency
        step_s = efficiency.step_s(limit, load, layers, share.ranks)
        ttft_s = efficiency.ttft_s(limit, load, layers, share.ranks)
        rate, largest = load.concurrency / step_s, self._rate_errors.largest
        answer_s = step_s * load.output_tokens
        waiting = self.load.concurrency - load.concurrency
        between = None
        if load.output_tokens > 1:
            between = max(limit.decode + limit.kv, (answer_s - ttft_s) / (load.output_tokens - 1))
        return ExpectedReport(
            concurrency=load.concurrency,
            tokens_per_s=rate,
            tokens_per_s_low=rate / (1 + largest),
            tokens_per_s_high=min(load.concurrency / limit.step, rate / (1 - largest)),
            efficiency=limit.step / step_s,
            inter_token_s=between,
            ttft_s=ttft_s + waiting * answer_s / load.concurrency,
            ttft_idle_s=efficiency.ttft_alone_s(limit, layers, share.ranks),
        )

    def _command(self, wish: Wish, quantization: str, kv: KVStored) -> str:
        words = ["quire", "serve", self._argument]
        if quantization == "fp8" and not self.model.stores_fp8:
            words += ["--quantization", "fp8"]
        if kv is KVStored.fp8:
            words += ["--kv-dtype", "fp8"]
        if wish.ranks > 1:
            words += ["--tensor-parallel-size", str(wish.ranks)]
        if self.load.concurrency > Config().max_num_seqs:
            words += ["--max-num-seqs", str(self.load.concurrency)]
        if self._used_share != Config().gpu_memory_utilization:
            words += ["--gpu-memory-utilization", f"{self._used_share:g}"]
        return shlex.join(words)

    # ------------------------------------------------------------------------------------------ what would fit

    def _instead(self, wish: Wish) -> list[str]:
        """The nearest changes that take the whole load at once."""
        found: list[str] = []
        for candidates in self._changes(wish):
            for candidate, words in candidates:
                gpu = self._catalogue.find(candidate.gpu)
                try:
                    memory = self._memory(self._share(candidate, gpu), gpu)
                except ValueError:
                    continue
                if memory.sequences >= self.load.concurrency:
                    found.append(words)
                    break
        return found[:MOST_INSTEAD]

    def _changes(self, wish: Wish) -> Iterator[list[tuple[Wish, str]]]:
        """Lists of alternatives, of which the first that fits is told: precision, number of GPUs, kind of GPU."""
        gpu = self._catalogue.find(wish.gpu)
        count = f"{wish.ranks} x {gpu.name}"
        if gpu.fp8_tflops is None:
            plain = replace(wish, quantization="none", kv_dtype="bfloat16")
            yield [(plain, f"{count} in bfloat16")] if plain != wish else []
        else:
            cache = replace(wish, kv_dtype="fp8")
            both = replace(cache, quantization="fp8")
            options = [
                (cache, f"{count} with --kv-dtype fp8"),
                (both, f"{count} with --quantization fp8 --kv-dtype fp8"),
            ]
            yield [(changed, words) for changed, words in options if changed != wish]
        yield [(replace(wish, ranks=size), f"{size} x {gpu.name}") for size in SIZES if size > wish.ranks]
        others = [(key, other) for key, other in self._catalogue.gpus.items() if other.served and key != wish.gpu]
        others.sort(key=lambda item: item[1].memory_mib)
        yield [(replace(wish, gpu=key), f"{wish.ranks} x {other.name}") for key, other in others]

    def _model_report(self) -> ModelReport:
        weights = Share.build(self.model, 1, "none", KVStored.bfloat16).weights
        names = {"none": "bfloat16"}
        return ModelReport(
            name=self.model.name,
            max_model_len=self.model.max_model_len,
            parameters=weights.num_bytes("none", 1),
            weights_bytes={names.get(scheme, scheme): weights.num_bytes(scheme, ITEMSIZE) for scheme in PACKED},
            kv_bytes_per_token={
                stored.name: Share.build(self.model, 1, "none", stored).kv_bytes_per_token for stored in KVStored
            },
        )
