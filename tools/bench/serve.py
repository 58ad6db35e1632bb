"""`quire bench serve`: load against any OpenAI-compatible server, ours or another's.

python -m tools.bench serve --concurrency 1,8,64 --prompt-tokens 512 --output-tokens 256
python -m tools.bench serve --url http://host:8000 --model m --rate 20 --requests 500
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import urllib.request
from typing import Any

import psutil

import quire
from core.errors import QuireError
from tools.bench.load import HEADER, Load, as_row, run
from tools.bench.report import report, table


def main(argv: list[str] | None = None) -> int:
    """Measure each concurrency (or rate) in turn and print one table."""
    parser = argparse.ArgumentParser(
        prog="quire bench serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="server's URL; default: this user's newest running Quire")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--key", help="API key")
    parser.add_argument("--concurrency", default="1,8,64", help="requests in flight, a list")
    parser.add_argument("--rate", help="arrivals per second instead (Poisson), a list")
    parser.add_argument("--requests", type=int, help="per measurement; default: 4 per concurrency, at least 16")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--output-spread", type=float, default=0.0, help="output lengths vary by this share")
    parser.add_argument("--shared-prefix", type=int, default=0, help="leading tokens that all prompts share")
    parser.add_argument("--turns", type=int, default=1, help="turns of each conversation")
    parser.add_argument("--vocab-size", type=int, default=4096, help="token ids are drawn below this")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--clients", type=int, default=1, help="client processes")
    parser.add_argument("--warmup", type=int, default=4, help="requests before the first measurement")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of prompts and arrivals")
    parser.add_argument("--json", action="store_true", help="one JSON object per measurement instead of the table")
    parser.add_argument("--processes", action="store_true", help="also the CPU share of each server process (local)")
    parser.add_argument("--plot", metavar="FILE", help="throughput against latency as a picture (needs matplotlib)")
    arguments = parser.parse_args(argv)
    url = arguments.url or _local_url()
    model = arguments.model or _first_model(url, arguments.key)
    points = [(None, int(text)) for text in arguments.concurrency.split(",")]
    if arguments.rate:
        points = [(float(text), 64) for text in arguments.rate.split(",")]  # type: ignore[misc]
    rows: list[list[str]] = []
    reports: list[dict[str, Any]] = []
    for number, (rate, concurrency) in enumerate(points):
        load = Load(
            url=url,
            model=model,
            num_requests=arguments.requests or max(16, 4 * concurrency),
            concurrency=concurrency,
            prompt_tokens=arguments.prompt_tokens,
            output_tokens=arguments.output_tokens,
            output_spread=arguments.output_spread,
            vocab_size=arguments.vocab_size,
            rate=rate,
            shared_prefix=arguments.shared_prefix,
            turns=arguments.turns,
            temperature=arguments.temperature,
            seed=arguments.seed + number,
            key=arguments.key,
            clients=min(arguments.clients, concurrency),
        )
        if number == 0 and arguments.warmup:
            warm = {**{f: getattr(load, f) for f in load.__dataclass_fields__}, "num_requests": arguments.warmup}
            run(Load(**{**warm, "concurrency": min(4, arguments.warmup), "rate": None, "clients": 1, "seed": -1}))
        before = cpu_seconds() if arguments.processes else {}
        answers, began, ended = run(load)
        result = report(answers, concurrency if rate is None else 0, began, ended)
        result["concurrency"], result["rate"] = concurrency, rate
        if arguments.processes:
            after = cpu_seconds()
            result["cpu_share"] = {
                name: (seconds - before[name]) / (ended - began) for name, seconds in after.items() if name in before
            }
        reports.append(result)
        rows.append(as_row(load, result))
        print(
            json.dumps(result) if arguments.json else f"  {rows[-1]}", file=sys.stderr if not arguments.json else None
        )
    if not arguments.json:
        print(f"\n{url}, {model}: {arguments.prompt_tokens} in, {arguments.output_tokens} out, {_machine()}\n")
        print(table(HEADER, rows))
        if arguments.processes:
            names = list(reports[0]["cpu_share"])
            cells = [
                [str(r["concurrency"]), *(f"{r['cpu_share'].get(name, 0):.0%}" for name in names)] for r in reports
            ]
            print("\n" + table(["C", *names], cells))
    if arguments.plot:
        plot(reports, arguments.plot)
    return 0 if all(not result["errors"] for result in reports) else 1


def cpu_seconds() -> dict[str, float]:
    """CPU seconds so far of each process of this user's newest server."""
    servers = quire.find_servers()
    if not servers:
        return {}
    supervisor = psutil.Process(servers[0]["pid"])
    found: dict[str, float] = {}
    for process in [supervisor, *supervisor.children(recursive=True)]:
        times = process.cpu_times()
        title = " ".join(process.cmdline()).strip()
        name = title.removeprefix("quire: ") if title.startswith("quire: ") else "supervisor"
        found[name] = found.get(name, 0.0) + times.user + times.system
    return found


def plot(reports: list[dict[str, Any]], path: str) -> None:
    """Throughput against the median inter-token time, one point per measurement."""
    import matplotlib.pyplot as plt  # optional: only --plot needs it

    figure, axes = plt.subplots(figsize=(6, 4))
    xs = [result["inter_token_s"]["p50"] * 1000 for result in reports]
    ys = [result["output_tokens_per_s"] for result in reports]
    axes.plot(xs, ys, marker="o")
    for x, y, result in zip(xs, ys, reports, strict=True):
        axes.annotate(str(result["rate"] or result["concurrency"]), (x, y))
    axes.set_xlabel("median inter-token time, ms")
    axes.set_ylabel("output tokens/s")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _machine() -> str:
    return f"{psutil.cpu_count()} cores, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"


def _local_url() -> str:
    servers = [server for server in quire.find_servers() if server.get("url")]
    if not servers:
        raise QuireError("not_found", "no running Quire server was found; start one, or pass --url")
    return str(servers[0]["url"])


def _first_model(url: str, key: str | None) -> str:
    request = urllib.request.Request(url + "/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(json.load(answer)["data"][0]["id"])


if __name__ == "__main__":
    sys.exit(main())
