"""Draws a Report: the model, a row per plan, and the parts of a plan that is alone."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tools.plan.report import PlanReport, Report

STYLES = {"fits": "green", "fewer": "yellow", "too_small": "red", "impossible": "red"}
SECONDS = {
    "products": "products of the layers",
    "head": "output layer",
    "kv": "KV cache that decoding reads",
    "attention": "attention of the prompts",
    "link": "sums over the GPUs",
}


def draw(report: Report) -> RenderableType:
    """Everything, in the order in which it is read."""
    parts: list[RenderableType] = [_model(report), _plans(report)]
    if len(report.plans) == 1:
        parts.append(_parts(report.plans[0]))
    parts += [Text(line) for line in _advice(report.plans)]
    parts += [Text(line, style="dim") for line in _caveats(report)]
    return Group(*parts)


def _table(title: str, columns: Sequence[str], left: int = 1) -> Table:
    """A table whose first `left` columns are words."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    return table


def _model(report: Report) -> Table:
    model = report.model
    title = f"{model.name}   {model.parameters / 1e9:,.2f} G parameters   up to {model.max_model_len:,} tokens"
    weights, cache = model.weights_bytes, model.kv_bytes_per_token
    columns = ["", *(f"weights {name}" for name in weights), *(f"KV a token {name}" for name in cache)]
    table = _table(title, columns)
    table.add_row("all", *(_size(count) for count in weights.values()), *(_size(count) for count in cache.values()))
    return table


def _plans(report: Report) -> Table:
    load = report.load
    title = f"{load.concurrency:,} at once, {load.prompt_tokens:,} in, {load.output_tokens:,} out"
    priced = any(plan.cost is not None for plan in report.plans)
    compared = any(plan.cost is not None and plan.cost.api_per_million_tokens is not None for plan in report.plans)
    columns = ["GPUs", "weights,\nKV", "fit", "weights\nper GPU", "KV tokens", "at once"]
    columns += ["limit\ntokens/s", "expected\ntokens/s", "TTFT", "inter-\ntoken"]
    columns += ["per M out\nper M"] * priced + ["pays from,\na day"] * compared
    table = _table(title, columns, left=3)
    before = ""
    for plan in report.plans:
        if plan.gpu != before and before:
            table.add_section()
        before = plan.gpu
        table.add_row(*_row(plan, priced, compared))
    return table


def _row(plan: PlanReport, priced: bool, compared: bool) -> list[str | Text]:
    weights = {"none": "bf16"}.get(plan.quantization, plan.quantization)
    cache = {"bfloat16": "bf16"}.get(plan.kv_dtype, plan.kv_dtype)
    fit = Text(plan.status.replace("_", " "), style=STYLES[plan.status])
    cells: list[str | Text] = [f"{plan.gpus} x {plan.gpu.upper()}", f"{weights}, {cache}", fit]
    memory, limit, expected, cost = plan.memory, plan.limit, plan.expected, plan.cost
    cells += ["-"] * 3 if memory is None else [
        _size(memory.weights_bytes), _count(memory.kv_tokens), _count(memory.sequences),
    ]  # fmt: skip
    if limit is None or expected is None:
        cells += ["-"] * 4
    else:
        cells += [
            _count(limit.tokens_per_s),
            f"{_count(expected.tokens_per_s)}\n{expected.efficiency:.0%} of it",
            _time(expected.ttft_s) + f"\nidle {_time(expected.ttft_idle_s)}",
            "-" if expected.inter_token_s is None else _time(expected.inter_token_s),
        ]
    if priced:
        cells.append("-" if cost is None else f"{cost.per_million_output_tokens:,.3f}\n{cost.per_million_tokens:,.3f}")
    if compared:
        cells.append(_volume(plan))
    return cells


def _volume(plan: PlanReport) -> str:
    cost = plan.cost
    if cost is None or cost.api_per_million_tokens is None:
        return "-"
    if cost.break_even_tokens_per_day is None:
        return "never"
    return f"{_count(cost.break_even_tokens_per_day)}\nof {_count(cost.most_tokens_per_day)}"


def _parts(plan: PlanReport) -> RenderableType:
    """What a step at the limit is made of."""
    if plan.limit is None or plan.expected is None or plan.memory is None:
        return Text("")
    limit, expected, memory = plan.limit, plan.expected, plan.memory
    table = _table("A step at the limit", ["work", "ms", "share"])
    for name, seconds in limit.seconds.items():
        if seconds > 0:
            table.add_row(SECONDS[name], f"{seconds * 1000:,.3f}", f"{seconds / limit.step_s:.0%}")
    table.add_section()
    table.add_row("the step", f"{limit.step_s * 1000:,.3f}", "100%")
    low, high = expected.tokens_per_s_low, expected.tokens_per_s_high
    lines = [
        f"Most of it: {limit.bound}. Expected between {low:,.0f} and {high:,.0f} tokens/s.",
        f"Memory of each GPU: {_size(memory.total_bytes)}, of it weights {_size(memory.weights_bytes)}, KV cache "
        f"{_size(memory.kv_bytes)}, the driver and the libraries {_size(memory.reserved_bytes)}.",
    ]
    lines += [f"Start it: {plan.command}"] * bool(plan.command)
    return Group(table, *(Text(line) for line in lines))


def _advice(plans: Sequence[PlanReport]) -> list[str]:
    """What does not fit, and what would."""
    lines = []
    for plan in plans:
        if plan.status != "fits":
            would = f" Would take it: {', or '.join(plan.instead)}." if plan.instead else ""
            lines.append(f"{plan.gpus} x {plan.name}: {plan.reason}.{would}")
    return lines


def _caveats(report: Report) -> list[str]:
    fit = report.fit
    lines = [
        f"Limit: bytes and operations alone. Expected: fitted on {fit.loads_fitted} loads of one {fit.gpu.upper()} "
        f"({fit.date}); on {fit.loads_held_out} others tokens/s is wrong by {fit.tokens_per_s_mean_error:.0%} on "
        f"average, {fit.tokens_per_s_largest_error:.0%} at most, TTFT by {fit.ttft_mean_error:.0%} and "
        f"{fit.ttft_largest_error:.0%}.",
    ]
    api = next((p.cost.api_per_million_tokens for p in report.plans if p.cost and p.cost.api_per_million_tokens), None)
    if api is not None:
        lines.append(
            f"The API takes {api:,.3f} per million tokens of this mix of prompt and output. Pays from: the volume from "
            "which GPUs rented all day cost less, of the most that they take; never: at full load they cost more."
        )
    if not all(plan.measured for plan in report.plans):
        lines.append(f"Only 1 x {fit.gpu.upper()} has been measured; everything else is carried over from it.")
    notes = {f"{plan.name}: {note}" for plan in report.plans for note in plan.notes}
    return lines + [f"{note}." for note in sorted(notes)]


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} B"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:,.1f} M"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1000:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1000:,.1f} ms"
