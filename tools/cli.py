"""`quire`: one table of commands. Each is imported when it is called, so that `quire --help` answers at once."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

# command -> (module with main(argv) -> exit code, one line of help)
COMMANDS = {
    "serve": ("tools.serve", "serve a model over HTTP and ZeroMQ"),
    "chat": ("tools.chat", "talk to a running server"),
    "status": ("tools.status", "what running servers and devices are doing (like nvidia-smi)"),
    "plan": ("tools.plan.__main__", "what a model needs and does on which GPUs, and what it costs"),
    "doctor": ("tools.doctor.__main__", "whether this machine is fit, and how to make it so"),
    "bench": ("tools.bench.__main__", "measure a server: serve, throughput, latency, startup, kernels …"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        result = importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])
        return int(result or 0)
    if argv == ["--version"]:
        print(f"quire {importlib.metadata.version('quire')}")
        return 0
    out = sys.stdout if not argv or argv[0] in ("-h", "--help") else sys.stderr
    if out is sys.stderr:
        print(f"quire: there is no command {argv[0]!r}", file=out)
    print("usage: quire COMMAND …   (quire COMMAND --help tells more)\n", file=out)
    for name, (_, text) in COMMANDS.items():
        print(f"  {name:<8} {text}", file=out)
    return 0 if out is sys.stdout else 2


if __name__ == "__main__":
    sys.exit(main())
