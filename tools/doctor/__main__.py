"""`quire doctor`: whether this machine is fit for `quire serve`, and how to make it so."""

from __future__ import annotations

import argparse
import json
import sys

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from core import config as configuration
from core.config import Config
from core.errors import QuireError
from tools.doctor import software, system
from tools.doctor.finding import Diagnosis, Finding, diagnosis
from tools.doctor.gpus import Driver

EXAMPLES = """Options of quire serve are taken too, and what they need is checked: MODEL, --port, --device, --cache-dir,
--tensor-parallel-size, --quantization …

examples:
  quire doctor                                                       is this machine fit for `quire serve`?
  quire doctor Qwen/Qwen3-4B --port 8001                             and for this command?
  quire doctor --device cuda --tensor-parallel-size 4
  HF_HUB_OFFLINE=1 quire doctor --json | jq '.findings[] | select(.status == "problem")'"""
STYLES = {"ok": "green", "skipped": "dim", "warning": "yellow", "problem": "bold red"}


def main(argv: list[str] | None = None) -> int:
    """Print the findings. 0: no problem; 1: there is one; 2: wrong usage."""
    parser = argparse.ArgumentParser(
        prog="quire doctor",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what is not known here is an option of quire serve
        usage="quire doctor [-h] [--json] [--json-schema] [MODEL] [options of quire serve]",
    )
    parser.add_argument("--json", action="store_true", help="print it for programs")
    parser.add_argument("--json-schema", action="store_true", help="print the JSON Schema of --json, and end")
    arguments, options = parser.parse_known_args(argv)
    if arguments.json_schema:
        print(json.dumps(msgspec.json.schema(Diagnosis), indent=2))
        return 0
    try:
        config = configuration.parse(options, prog="quire doctor")
    except QuireError as error:
        print(f"quire doctor: {error.message}", file=sys.stderr)
        return 2
    found = diagnosis(examine(config))
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        Console().print(draw(found))
    return 0 if found.ok else 1


def examine(config: Config) -> list[Finding]:
    """All checks for a server of this configuration."""
    with software.Probe() as probe:
        of_system = [
            system.processors(),
            system.open_files(config),
            system.shared_memory(config),
            system.sockets(config),
            system.port(config),
            *system.kernel_cache(config),
            system.download_folder(config),
            system.hub_access(config),
        ]
        installed = probe.result()
    with Driver() as driver:
        of_gpus = driver.check(config, installed.cuda_build)
        of_software = software.packages(installed, config, driver.num_gpus)
        compiler = software.compiler(config, driver.num_gpus)
    return [software.python(), *of_software, compiler, *of_gpus, *of_system]


def draw(found: Diagnosis) -> Table:
    """A line per finding; the last one sums up."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("check", "", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for finding in found.findings:
        status = Text(finding.status, style=STYLES[finding.status])
        table.add_row(finding.name, status, Text(finding.text), Text(finding.fix))
    problems = sum(finding.status == "problem" for finding in found.findings)
    warnings = sum(finding.status == "warning" for finding in found.findings)
    words = f"{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    table.caption = Text(words, style=STYLES["problem" if problems else "warning" if warnings else "ok"])
    table.caption_justify = "left"
    return table


if __name__ == "__main__":
    sys.exit(main())
