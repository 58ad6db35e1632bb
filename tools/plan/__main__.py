"""`quire plan`: what a model needs and does on which GPUs, and what it costs, from its config.json alone."""

from __future__ import annotations

import argparse
import json
import sys

import msgspec
from rich.console import Console

from core.errors import QuireError
from tools.plan.cost import Prices
from tools.plan.draw import draw
from tools.plan.gpus import Catalogue
from tools.plan.limit import Load
from tools.plan.model import PlannedModel
from tools.plan.planner import SIZES, Planner, Wish
from tools.plan.report import Report

EXAMPLES = """examples:
  quire plan meta-llama/Llama-3.1-8B-Instruct                       every GPU, 1 to 8 of them
  quire plan /models/Llama-3.1-70B --gpu h200 --num 1 --quantization fp8 --kv-dtype fp8
  quire plan Qwen/Qwen3-8B --gpu h100,l40s --concurrency 32 --prompt-tokens 2000 --output-tokens 300
  quire plan Qwen/Qwen3-8B --price-per-hour h200=3.5,h100=2.5 --api-price-per-million 0.6
  quire plan tiny-chat --json | jq '.plans[0].expected'"""

LEAST_WIDTH = 138  # of the table; a narrower terminal breaks its lines itself


def main(argv: list[str] | None = None) -> int:
    """Print the plans. 0: at least one takes the whole load; 1: none does; 2: wrong usage."""
    arguments = _parser().parse_args(argv)
    if arguments.json_schema:
        print(json.dumps(msgspec.json.schema(Report), indent=2))
        return 0
    try:
        report = plan(arguments)
    except QuireError as error:
        print(f"quire plan: {error.message}", file=sys.stderr)
        return 2
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        console = Console()
        console.width = max(console.width, LEAST_WIDTH)
        console.print(draw(report))
    return 0 if any(one.status == "fits" for one in report.plans) else 1


def plan(arguments: argparse.Namespace) -> Report:
    """The answer to a command line. Raises QuireError."""
    if arguments.model is None:
        raise QuireError("invalid_config", "MODEL: name a folder, a Hugging Face id or tiny-chat", "model")
    catalogue = Catalogue.read()
    keys = [key.strip().lower() for key in arguments.gpu.split(",")] if arguments.gpu else list(catalogue.gpus)
    for key in keys:
        catalogue.find(key)
    model = PlannedModel.read(arguments.model, arguments.revision)
    load = Load(arguments.concurrency, arguments.prompt_tokens, arguments.output_tokens)
    if load.total_tokens > model.max_model_len:
        text = f"--prompt-tokens: {load.prompt_tokens} and {load.output_tokens} of output are more than the "
        raise QuireError("invalid_config", f"{text}{model.max_model_len} positions of {model.name}", "prompt_tokens")
    numbers = _numbers(arguments.num)
    wishes = [Wish(key, ranks, arguments.quantization, arguments.kv_dtype) for key in keys for ranks in numbers]
    planner = Planner(model, arguments.model, load, arguments.gpu_memory_utilization)
    return planner.report(wishes, _prices(arguments, keys))


def _numbers(text: str) -> list[int]:
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= number <= 64 for number in numbers):
        raise QuireError("invalid_config", f"--num: must be numbers from 1 to 64, like 1,2,4; is {text!r}", "num")
    return numbers


def _prices(arguments: argparse.Namespace, keys: list[str]) -> dict[str, Prices]:
    """By GPU. --price-per-hour is one price for all, or gpu=price of each."""
    given: str | None = arguments.price_per_hour
    api, prompt = arguments.api_price_per_million, arguments.api_prompt_price_per_million
    if given is None:
        if api is not None or prompt is not None:
            text = "--api-price-per-million: needs --price-per-hour of the GPU to compare with"
            raise QuireError("invalid_config", text, "price_per_hour")
        return {}
    if prompt is not None and api is None:
        text = "--api-prompt-price-per-million: needs --api-price-per-million for the output tokens"
        raise QuireError("invalid_config", text, "api_price_per_million")
    found = {}
    for part in given.split(","):
        name, equals, text = part.rpartition("=")
        price = _positive(text, "--price-per-hour", "a price like 3.5, or gpu=price of each, like h200=3.5,h100=2.5")
        for key in [name.strip().lower()] if equals else keys:
            if key not in keys:
                raise QuireError("invalid_config", f"--price-per-hour: {key!r} is not planned for", "price_per_hour")
            found[key] = Prices(price, api, prompt)
    return found


def _positive(text: str, option: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise QuireError("invalid_config", f"{option}: must be {what}; is {text!r}", option[2:].replace("-", "_"))
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 10**7:
        raise argparse.ArgumentTypeError(f"must be from 1 to 10,000,000, is {value}")
    return value


def _money(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, is {text}")
    return value


def _used(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, is {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quire plan",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder with a config.json, Hugging Face id, built-in"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    known = ", ".join(Catalogue.read().gpus)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpu", metavar="GPU,…", help=f"kinds of GPU (default: all of {known})")
    sizes = ",".join(map(str, SIZES))
    machine.add_argument("--num", default=sizes, metavar="N,…", help=f"GPUs that share the model (default: {sizes})")
    machine.add_argument("--quantization", choices=("auto", "none", "fp8"), default="auto", help="as of quire serve")
    machine.add_argument("--kv-dtype", choices=("auto", "bfloat16", "fp8"), default="auto", help="as of quire serve")
    machine.add_argument(
        "--gpu-memory-utilization", type=_used, default=0.9, metavar="X", help="as of quire serve (default: 0.9)"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--concurrency", type=_count, default=64, metavar="C", help="requests at once (default: 64)")
    load.add_argument("--prompt-tokens", type=_count, default=512, metavar="N", help="of each request (default: 512)")
    load.add_argument("--output-tokens", type=_count, default=256, metavar="N", help="of each request (default: 256)")
    money = parser.add_argument_group("money (one currency for all)")
    money.add_argument("--price-per-hour", metavar="PRICE", help="of one GPU; or of each kind: h200=3.5,h100=2.5")
    money.add_argument("--api-price-per-million", type=_money, metavar="PRICE", help="what an API takes for tokens")
    money.add_argument(
        "--api-prompt-price-per-million", type=_money, metavar="PRICE", help="for prompt tokens, if that differs"
    )
    parser.add_argument("--json", action="store_true", help="print it for programs")
    parser.add_argument("--json-schema", action="store_true", help="print the JSON Schema of --json, and end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
