"""`quire status`: what the running servers and the devices are doing, like nvidia-smi."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import psutil
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

import quire
from core.stats import Histogram

REFRESH_S = 1.0


@dataclass
class View:
    """One look at one server. `rates` and percentiles come from the difference to an earlier look."""

    server: dict[str, Any]
    stats: dict[str, Any] | None
    error: str = ""
    taken_s: float = field(default_factory=time.monotonic)
    processes: list[dict[str, Any]] = field(default_factory=list)


def look(server: dict[str, Any], timeout_s: float = 3.0) -> View:
    """Ask a server for its figures."""
    try:
        # Not over HTTP: its certificate may be one that this machine does not know.
        with quire.Client(server["client_address"], timeout_s=timeout_s) as client:
            stats = client.stats()
    except quire.QuireError as error:
        return View(server, None, str(error))
    return View(server, stats, processes=processes(stats))


_known: dict[int, psutil.Process] = {}


def processes(stats: dict[str, Any]) -> list[dict[str, Any]]:
    """CPU (percent since the last look) and memory of each process of a server."""
    found = []
    for key, pid in stats["server"].items():
        if not key.startswith("pid."):
            continue
        try:
            process = _known.setdefault(int(pid), psutil.Process(int(pid)))
            with process.oneshot():
                found.append(
                    {
                        "name": key.removeprefix("pid."),
                        "pid": int(pid),
                        "cpu_percent": process.cpu_percent(),
                        "memory_bytes": process.memory_info().rss,
                    }
                )
        except psutil.Error:
            _known.pop(int(pid), None)
    return found


def devices() -> list[dict[str, Any]]:
    """NVIDIA devices of this machine, used by Quire or not; none without a driver."""
    try:
        import pynvml  # absent driver, not absent package: nvidia-ml-py is always installed

        pynvml.nvmlInit()
    except Exception:  # pynvml raises its own kinds for a missing library, driver or permission
        return []
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
        name = pynvml.nvmlDeviceGetName(handle)
        found.append(
            {
                "index": index,
                "name": name.decode() if isinstance(name, bytes) else name,
                "memory_used_bytes": int(memory.used),
                "memory_total_bytes": int(memory.total),
                "utilization_percent": int(rates.gpu),
                "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
                "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            }
        )
    pynvml.nvmlShutdown()
    return found


def summary(view: View, earlier: View | None = None) -> dict[str, Any]:
    """A server's figures as plain numbers: the JSON of `--json` and the source of the table."""
    result: dict[str, Any] = {
        "model": view.server["model"],
        "engine": view.server.get("engine"),
        "url": view.server.get("url"),
        "client_address": view.server["client_address"],
        "version": view.server.get("version"),
        "uptime_s": round(time.time() - view.server["started"], 1),
    }
    if view.stats is None:
        return result | {"state": "not answering", "error": view.error}
    engine, api = view.stats["engine"], view.stats["api"]
    before = earlier.stats if earlier is not None and earlier.stats is not None else None
    seconds = view.taken_s - earlier.taken_s if earlier is not None else result["uptime_s"]
    rates = {
        f"{name}_per_s": round((engine[key] - (before["engine"][key] if before else 0)) / max(seconds, 1e-3), 1)
        for name, key in (("output_tokens", "output_tokens"), ("prompt_tokens", "prompt_tokens"), ("steps", "steps"))
    }
    workers = view.stats["workers"]
    return result | {
        "state": view.stats["state"],
        "restarts": view.stats["server"].get("restarts", 0),
        "device": ", ".join(sorted({worker["device"] for worker in workers.values() if worker["device"]})),
        "weights_bytes": sum(worker["weights_bytes"] for worker in workers.values()),
        "kv_bytes": sum(worker["kv_bytes"] for worker in workers.values()),
        "kv_blocks_total": engine["kv_blocks_total"],
        "kv_blocks_used": engine["kv_blocks_used"],
        "kv_blocks_cached": engine["kv_blocks_cached"],
        "running": engine["running"],
        "waiting": engine["waiting"],
        "waiting_by": engine["waiting_by"],
        "preemptions": engine["preemptions"],
        "idle_share": _idle_share(engine, before["engine"] if before else None),
        "prefix_hit_share": round(engine["cached_tokens"] / max(1, engine["prompt_tokens"]), 4),
        **rates,
        "ttft_s": _percentiles(api["ttft"], before["api"]["ttft"] if before else None),
        "inter_token_s": _percentiles(api["inter_token"], before["api"]["inter_token"] if before else None),
        "requests": {key: api[key] for key in ("live", "finished", "rejected", "failed", "aborted")},
        "errors": api["errors"],
        "processes": view.processes,
    }


def _idle_share(now: dict[str, Any], before: dict[str, Any] | None) -> float | None:
    """The device's time without a step, of the time with work; None when there was none."""
    idle = now["idle_s"] - (before["idle_s"] if before else 0.0)
    whole = idle + now["busy_s"] - (before["busy_s"] if before else 0.0)
    return round(idle / whole, 4) if whole > 0 else None


def _percentiles(now: dict[str, Any], before: dict[str, Any] | None) -> dict[str, float | None]:
    histogram = Histogram(now["counts"], now["total"])
    if before is not None:
        recent = histogram.since(Histogram(before["counts"], before["total"]))
        histogram = recent if recent.count else histogram
    return {"p50": histogram.quantile(0.5), "p99": histogram.quantile(0.99)}


# ------------------------------------------------------------------------------------------------ drawing


def draw(summaries: list[dict[str, Any]], gpus: list[dict[str, Any]]) -> Table:
    """Everything on one screen."""
    page = Table.grid(padding=(0, 0))
    for item in summaries:
        page.add_row(_server_table(item))
    if gpus:
        page.add_row(_gpu_table(gpus))
    return page


def _server_table(item: dict[str, Any]) -> Table:
    table = Table(title=f"Quire {item['version']}   {item['model']}   {item['url'] or item['client_address']}")
    table.title_justify = "left"
    if "error" in item:
        table.add_column("state")
        table.add_row(Text(f"not answering: {item['error']}", style="red"))
        return table
    for name in ("state", "device", "memory", "KV blocks", "requests", "tokens/s", "latency", "processes"):
        table.add_column(name, overflow="fold")
    total = max(1, item["kv_blocks_total"])
    table.add_row(
        Text(item["state"], style="green" if item["state"] == "ready" else "yellow")
        + Text(f"\nup {_duration(item['uptime_s'])}\n{item['restarts']} restarts", style="dim"),
        (item["device"] or "-") + ("" if item["idle_share"] is None else f"\nidle {item['idle_share']:.0%} of work"),
        f"weights {_size(item['weights_bytes'])}\nKV {_size(item['kv_bytes'])}",
        f"{item['kv_blocks_used'] / total:4.0%} used\n{item['kv_blocks_cached'] / total:4.0%} cached\n"
        f"of {item['kv_blocks_total']:,}\nhits {item['prefix_hit_share']:.0%}",
        f"running {item['running']}\nwaiting {item['waiting']}\npreempted {item['preemptions']}",
        f"out {item['output_tokens_per_s']:,.0f}\nin {item['prompt_tokens_per_s']:,.0f}\n"
        f"steps {item['steps_per_s']:,.0f}",
        f"TTFT {_latency(item['ttft_s'])}\ninter-token {_latency(item['inter_token_s'])}",
        "\n".join(
            f"{p['name']:<12} {p['pid']:>7} {p['cpu_percent']:5.0f} % {_size(p['memory_bytes']):>9}"
            for p in item["processes"]
        ),
    )
    return table


def _gpu_table(gpus: list[dict[str, Any]]) -> Table:
    table = Table(title="Devices")
    table.title_justify = "left"
    for name in ("GPU", "name", "memory", "use", "temperature", "power"):
        table.add_column(name)
    for gpu in gpus:
        memory = f"{_size(gpu['memory_used_bytes'])} / {_size(gpu['memory_total_bytes'])}"
        use, heat, power = f"{gpu['utilization_percent']} %", f"{gpu['temperature_c']} °C", f"{gpu['power_w']:.0f} W"
        table.add_row(str(gpu["index"]), gpu["name"], memory, use, heat, power)
    return table


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _latency(percentiles: dict[str, float | None]) -> str:
    def milliseconds(value: float | None) -> str:
        return "-" if value is None else f"{value * 1000:,.1f}"

    return f"{milliseconds(percentiles['p50'])} / {milliseconds(percentiles['p99'])} ms (p50 / p99)"


# ------------------------------------------------------------------------------------------------ the command


def main(argv: list[str] | None = None) -> int:
    """Print the status once, or keep it on the screen. 1 when no server runs."""
    parser = argparse.ArgumentParser(prog="quire status", description=__doc__)
    parser.add_argument("--watch", action="store_true", help="keep it on the screen, once a second, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print plain figures for programs")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds that rates are measured over")
    arguments = parser.parse_args(argv)
    servers = quire.find_servers()
    if not servers and not arguments.watch:
        if arguments.json:
            print(json.dumps({"servers": [], "devices": devices()}))
        else:
            print("No Quire server is running on this machine for this user. Start one with: quire serve")
            if gpus := devices():
                Console().print(_gpu_table(gpus))
        return 1
    if arguments.watch:
        return _watch()
    first = [look(server) for server in servers]
    time.sleep(arguments.interval)
    summaries = [summary(look(view.server), view) for view in first]
    if arguments.json:
        print(json.dumps({"servers": summaries, "devices": devices()}, indent=2))
    else:
        Console().print(draw(summaries, devices()))
    return 0


def _watch() -> int:
    earlier: dict[int, View] = {}
    try:
        with Live(console=Console(), screen=True, auto_refresh=False) as screen:
            while True:
                views = [look(server) for server in quire.find_servers()]
                summaries = [summary(view, earlier.get(view.server["pid"])) for view in views]
                if summaries:
                    screen.update(draw(summaries, devices()), refresh=True)
                else:
                    screen.update(Text("No Quire server is running. Waiting for one …"), refresh=True)
                earlier = {view.server["pid"]: view for view in views if view.stats is not None}
                time.sleep(REFRESH_S)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
