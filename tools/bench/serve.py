"""`quire bench serve`: load against any OpenAI-compatible server, ours or another's.

python -m tools.bench serve --concurrency 1,8,64 --prompt-tokens 512 --output-tokens 256
python -m tools.bench serve --url http://host:8000 --model m --rate 20 --requests 500
python -m tools.bench serve --chat --tokenizer m/tokenizer.json --turns 4 --shared-prefix 256
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import quire
from core.errors import QuireError
from tools.bench.cpu_shares import CpuShares
from tools.bench.load import Load
from tools.bench.plot import plot, require_matplotlib
from tools.bench.report import HEADER, notes, report, row, table
from tools.bench.sender import send
from tools.bench.stamp import lines, stamp


def main(argv: list[str] | None = None) -> int:
    """Measure each concurrency (or rate) in turn and print one table. 1 when a request failed."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    try:
        if options.plot:
            require_matplotlib()
        stamped = stamp("serve", argv)
        loads = _loads(options)
        if options.warmup:
            send(dataclasses.replace(loads[0], **_warm_up(loads[0], options.warmup)))
        results = [measure(load, options.server_pid) for load in loads if _say(load)]
    except QuireError as error:
        print(f"quire bench serve: {error.message}", file=sys.stderr)
        return 2
    if options.json:
        settings = {**dataclasses.asdict(loads[0]), "key": None}
        print(json.dumps({**stamped, "settings": settings, "results": results}))
    else:
        print(f"{lines(stamped)}\n\n{table(HEADER, [row(result) for result in results])}")
        if options.processes and any(result["cpu_shares"] for result in results):
            print("\nCPU share of each process (100 %: one core)\n\n" + shares_table(results))
        for note in notes(results):
            print(f"\nNote: {note}.")
    if options.plot:
        plot(results, options.plot)
    return 1 if any(result["errors"] for result in results) else 0


def measure(load: Load, server_pid: int | None = None) -> dict[str, Any]:
    """Send a load; its report, with the CPU share of each server process when the server is local."""
    shares = CpuShares(server_pid) if server_pid else CpuShares.of_url(load.url)
    sent = send(load)
    result = report(load, sent)
    result["cpu_shares"] = shares.shares(sent.ended_s - sent.began_s) if shares else {}
    return result


def shares_table(results: list[dict[str, Any]]) -> str:
    """CPU share of each server process, and of the busiest client process."""
    names = list(dict.fromkeys(name for result in results for name in result["cpu_shares"]))
    cells = [
        [row(r)[0], *(f"{r['cpu_shares'].get(n, 0):.0%}" for n in names), f"{max(r['client_shares']):.0%}"]
        for r in results
    ]
    return table(["C", *names, "client"], cells)


def _loads(options: argparse.Namespace) -> list[Load]:
    url = (options.url or _local_url()).rstrip("/").removesuffix("/v1")
    key = options.key or (None if options.url else quire.default_api_key())
    load = Load(
        url=url,
        model=options.model or _first_model(url, key),
        num_requests=options.turns,
        concurrency=1,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        output_spread=options.output_spread,
        vocab_size=options.vocab_size,
        shared_prefix=options.shared_prefix,
        prefix_groups=options.prefix_groups,
        turns=options.turns,
        temperature=options.temperature,
        seed=options.seed,
        key=key,
        chat=options.chat,
        tokenizer=options.tokenizer,
        timeout_s=options.timeout_s,
    )
    if load.tokenizer is not None:
        load = dataclasses.replace(load, overhead=_overhead(load))
    points: list[tuple[float | None, int]] = [(None, int(text)) for text in options.concurrency.split(",")]
    if options.rate:
        points = [(float(text), options.clients) for text in options.rate.split(",")]
    return [
        dataclasses.replace(
            load,
            num_requests=_round_up(options.requests or _enough(rate, concurrency), options.turns),
            concurrency=concurrency,
            rate=rate,
            seed=options.seed + number,  # else a point would find the prompts of the one before in the cache
            clients=min(options.clients, concurrency),
        )
        for number, (rate, concurrency) in enumerate(points)
    ]


def _enough(rate: float | None, concurrency: int) -> int:
    """Requests of a measurement: six full waves, since in fewer their beat shows, or half a minute of arrivals."""
    return max(16, 8 * concurrency) if rate is None else max(64, int(30 * rate))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _warm_up(load: Load, num_requests: int) -> dict[str, Any]:
    count = _round_up(num_requests, load.turns)
    return {"num_requests": count, "concurrency": min(4, count), "rate": None, "clients": 1, "seed": -1}


def _overhead(load: Load) -> int:
    """Tokens that the server adds to a text prompt: asked of the server by one request."""
    probe = dataclasses.replace(load, num_requests=1, turns=1, output_tokens=1, output_spread=0.0, seed=-2)
    answer = send(probe).answers[0]
    if answer.error or not answer.prompt_tokens:
        raise QuireError(
            "engine_failed", f"the probe of the chat template's length failed: {answer.error or 'no usage'}"
        )
    return answer.prompt_tokens - load.prompt_tokens


def _say(load: Load) -> bool:
    arrivals = f"{load.rate:g} requests/s" if load.rate is not None else f"{load.concurrency} in flight"
    print(f"  {load.num_requests} requests, {arrivals} …", file=sys.stderr)
    return True


def _local_url() -> str:
    servers = [server for server in quire.find_servers() if server.get("url")]
    if not servers:
        raise QuireError("not_found", "no running Quire server was found; start one, or pass --url")
    return str(servers[0]["url"])


def _first_model(url: str, key: str | None) -> str:
    request = urllib.request.Request(url + "/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, urllib.error.URLError, ValueError, LookupError) as error:
        raise QuireError("not_found", f"{url}/v1/models names no model ({error}); pass --model") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quire bench serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    server = parser.add_argument_group("server")
    server.add_argument("--url", help="default: this user's newest running Quire")
    server.add_argument("--model", help="default: the first that the server lists")
    server.add_argument("--key", help="API key; default: QUIRE_API_KEY for a Quire of this user, else none")
    server.add_argument(
        "--server-pid", type=int, help="root process of a local server that is not Quire, for CPU shares"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--concurrency", default="1,8,64", help="requests in flight, a list (default: %(default)s)")
    load.add_argument("--rate", help="arrivals per second instead (Poisson), a list")
    load.add_argument("--requests", type=int, help="of each; default: 8 per concurrency, at least 16; 30 s of a rate")
    load.add_argument("--prompt-tokens", type=int, default=512, help="exact (default: %(default)s)")
    load.add_argument("--output-tokens", type=int, default=256, help="exact (default: %(default)s)")
    load.add_argument("--output-spread", type=float, default=0.0, help="output lengths vary by this share")
    load.add_argument("--shared-prefix", type=int, default=0, help="leading tokens that prompts share")
    load.add_argument("--prefix-groups", type=int, default=1, help="groups of prompts that share one")
    load.add_argument("--turns", type=int, default=1, help="turns of each conversation (--chat)")
    load.add_argument("--chat", action="store_true", help="/v1/chat/completions instead of /v1/completions")
    load.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json: prompts are text instead of token ids")
    load.add_argument("--vocab-size", type=int, default=4096, help="token ids are drawn below this")
    load.add_argument("--temperature", type=float, default=0.0)
    load.add_argument("--seed", type=int, default=int(time.time()), help="of prompts and arrivals; default: the time")
    run = parser.add_argument_group("measurement")
    run.add_argument("--clients", type=int, default=1, help="client processes")
    run.add_argument("--warmup", type=int, default=4, help="requests before the first measurement")
    run.add_argument("--timeout-s", type=float, default=600.0, help="of one request")
    run.add_argument(
        "--processes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also the CPU share of each process of a local server",
    )
    run.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    run.add_argument("--plot", metavar="FILE", help="throughput against latency as a picture (needs matplotlib)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
