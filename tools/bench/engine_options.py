"""engine_options: flags of `quire serve` on a benchmark's command line, as keywords of quire.LLM."""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import QuireError


def engine_options(argv: Sequence[str]) -> dict[str, str | bool]:
    """["--dtype", "float32", "--no-prefix-caching"] -> {"dtype": "float32", "prefix_caching": False}.

    The values stay texts; the engine itself checks names and values. Raises QuireError for what is no flag.
    """
    found: dict[str, str | bool] = {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise QuireError("invalid_config", f"{flag!r}: expected an option that begins with --", flag)
        name, equals, value = flag[2:].partition("=")
        if equals:
            found[name.replace("-", "_")] = value
        elif rest and not rest[0].startswith("--"):
            found[name.replace("-", "_")] = rest.pop(0)
        elif name.startswith("no-"):
            found[name[3:].replace("-", "_")] = False
        else:
            found[name.replace("-", "_")] = True
    return found
