"""Native: compiles native.c for this very processor, once, and loads it. No compiler: None, and plain torch serves.

The library is kept in the user's cache folder under a digest of source, compiler and processor; it is about a second's
work. Only code of this package is compiled.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("native.c")
# Sums may be reordered and expf vectorised; compiled apart from linking, because linking with -ffast-math would make
# the whole process flush denormals.
COMPILE = ("-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-fPIC", "-fopenmp", "-c")
TIMEOUT_S = 60
P, L, F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
SIGNATURES = {
    "add_rms_norm": [P, P, P, P, P, L, L, F],
    "silu_mul": [P, P, L, L],
    "rope_cache": [P] * 7 + [P, P, F] + [L] * 6,
    "decode_attention": [P] * 8 + [L] * 9 + [F],
    "product_half": [P] * 4 + [L] * 3,
}

log = logging.getLogger("quire.cpu")


def find_compiler() -> str | None:
    """The C compiler's path."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def load(cache: Path) -> ctypes.CDLL | None:
    """The library, compiled into `cache` when it is not there; None when it cannot be had, with a log line."""
    compiler = find_compiler()
    if compiler is None:
        log.info("no C compiler: decoding on the CPU takes torch's way, which is slower")
        return None
    path = cache / f"cpu-{_digest(compiler)}.so"
    try:
        if not path.is_file():
            _compile(compiler, path)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("native code is not used, torch serves instead: %s", error)
        return None
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


def _digest(compiler: str) -> str:
    digest = hashlib.sha256(SOURCE.read_bytes())
    digest.update(" ".join((compiler, *COMPILE, platform.machine())).encode())
    info = Path("/proc/cpuinfo")
    if info.is_file():  # -march=native on one machine of a shared home must not crash on another
        lines = {line for line in info.read_text().splitlines() if line.startswith(("flags", "model name", "Features"))}
        digest.update("\n".join(sorted(lines)).encode())
    return digest.hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part, library = Path(folder, "native.o"), Path(folder, "native.so")
        for command in (
            [compiler, *COMPILE, str(SOURCE), "-o", str(part)],
            [compiler, "-shared", "-fopenmp", str(part), "-o", str(library), "-lm"],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
        os.replace(library, path)  # several workers may do this at once; each leaves a whole file
