"""Which backend serves: an ordered table, probed from the top. Adding one is one line here, or an entry point.

A backend module offers `available() -> str | None` (None: usable; otherwise the reason why not) and
`make(rank, cache) -> Backend` (`cache`: folder for compiled code, or None). Modules are imported by name only when
asked for, since they may need what is not installed.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from core.errors import QuireError
from hw.backend import Backend

BACKENDS: dict[str, str] = {
    "cuda": "hw.cuda.backend",
    "rocm": "hw.rocm.backend",
    "cpu": "hw.cpu.backend",
}
AUTO = tuple(BACKENDS)
ENTRY_POINTS = "quire.backends"  # of other distributions: name = "module"


def known() -> dict[str, str]:
    """Name -> module of every backend: other distributions' first, since the user installed them on purpose."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)} | BACKENDS


def select(device: str, rank: int = 0, cache: Path | None = None) -> Backend:
    """The backend for `--device`; "auto" takes the first that is usable. `cache`: folder for compiled code.

    Raises:
        QuireError invalid_config: the name is unknown, or the device is not there (with the reason).
    """
    table = known()
    if device == "auto":
        others = [name for name in table if name not in BACKENDS]
        for name in (*others, *AUTO):
            module, reason = _probe(table[name])
            if reason is None:
                return _make(module, rank, cache)
        raise _error(f"no usable device; install torch for one of: {', '.join(table)}")
    if device not in table:
        raise _error(f"--device: {device!r} is not known; choose one of: auto, {', '.join(table)}")
    module, reason = _probe(table[device])
    if reason is not None:
        raise _error(f"--device: {device!r} cannot be used: {reason}")
    return _make(module, rank, cache)


def _probe(name: str) -> tuple[Any, str | None]:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return None, f"{error}"
    return module, module.available()


def _make(module: Any, rank: int, cache: Path | None) -> Backend:
    backend: Backend = module.make(rank, cache)
    return backend


def _error(text: str) -> QuireError:
    return QuireError("invalid_config", text, "device")
