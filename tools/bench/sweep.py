"""`quire bench sweep`: start a server, measure it at several concurrencies, stop it. One command per row of RESULTS.md.

python -m tools.bench sweep --concurrency 1,16,64 -- MODEL --device cuda --quantization fp8 --load-format dummy
"""

from __future__ import annotations

import argparse
import sys

from tools.bench import serve
from tools.bench.server import running


def main(argv: list[str] | None = None) -> int:
    """What stands behind `--` goes to `quire serve`; everything else to `quire bench serve`."""
    argv = sys.argv[1:] if argv is None else argv
    if "--" not in argv:
        argparse.ArgumentParser(
            prog="quire bench sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        ).print_help()
        return 0 if argv[:1] in (["--help"], ["-h"]) else 2
    at = argv.index("--")
    with running(*argv[at + 1 :]) as server:
        print("\n".join(server["lines"]))
        print(f"first healthy answer after {server['start_s']:.1f} s", flush=True)
        return serve.main(["--url", server["url"], *argv[:at]])


if __name__ == "__main__":
    sys.exit(main())
