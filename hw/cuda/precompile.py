"""Precompile: a model's kernels compiled by several processes at once, while the weights load.

What is needed is not written down a second time: a forked process runs the real capture on tensors without memory and
notes what the launches would compile. It then forks compilers, which fill Triton's cache; the capture proper finds its
kernels there. None of these processes touches the device. Whatever is missed or fails is compiled when it is launched.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

import ctypes
import gc
import logging
import os
import select
import signal
import sys
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hw.backend import HostCopy, Span, Trace
from hw.comm import Comm
from hw.cpu.backend import Copied, CpuSpan
from hw.cuda.backend import CudaBackend
from hw.cuda.ops import CudaOps

log = logging.getLogger("quire.cuda")

TIMEOUT_S = 120.0
MOST_JOBS = 16384  # of two bytes each: they must fit into a pipe before anyone reads
COMPILED, CACHED, FAILED = b"C", b"H", b"F"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation of a kernel, as `triton.compile` wants it."""

    fn: Any
    signature: dict[str, Any]
    constexprs: dict[Any, Any]
    attrs: dict[Any, Any]
    options: dict[str, Any]
    target: GPUTarget

    def compile(self) -> bool:
        """Compile into the cache; whether it was there already."""
        hits = []
        triton.knobs.compilation.listener = lambda **kwargs: hits.append(kwargs["cache_hit"])
        source = ASTSource(self.fn, self.signature, self.constexprs, self.attrs)
        triton.compile(source, target=self.target, options=self.options)
        return bool(hits and hits[0])


class Nothing:
    """Takes every call and does nothing: streams, graphs and kernels of a trace."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class NoCuda(Nothing):
    """torch.cuda of a process that must not touch the device."""

    def is_available(self) -> bool:
        return False


class NoDriver:
    """Triton's driver without a device: a target is enough to specialise a launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class NoGenerator:
    """Random weights are not drawn in a trace."""

    def __init__(self, device: Any = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        return None


class TraceBackend(CudaBackend):
    """The backend with tensors that have shapes and offsets but no memory."""

    def __init__(self, capabilities: Any, pdl: bool) -> None:
        self.device = torch.device("meta")
        self.ops = CudaOps(self.device, pdl)
        self.capabilities = capabilities

    def free_bytes(self) -> int:
        return 1 << 40

    def to_host(self, tensor: torch.Tensor) -> HostCopy:
        return Copied(tensor)

    def span(self) -> Span:
        return CpuSpan()


class TraceComm(Comm):
    """Ranks that nobody hears; results have the right shapes."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[0], self.size * x.shape[1])


def collect(trace: Trace, capabilities: Any, target: GPUTarget, pdl: bool, comm: Comm) -> list[Variant]:
    """What the launches of `trace` compile. Leaves this process unable to use a device: for a forked one."""
    found: list[Variant] = []

    def note(self, key, signature, device, constexprs, options, attrs, warmup):
        found.append(Variant(self, signature, constexprs, attrs, dict(options.__dict__), target))
        kernel = Nothing()
        self.device_caches[device][0][key] = kernel  # later launches of it then cost next to nothing
        return kernel

    JITFunction._do_compile = note
    driver.set_active(NoDriver(target))
    setattr(torch, "cuda", NoCuda())  # noqa: B010 - a module attribute
    setattr(torch, "Generator", NoGenerator)  # noqa: B010
    # Operations without memory import torch's compiler, which takes seconds, only to say that they are not for it.
    sys.modules["torch._dynamo"] = compiler = ModuleType("torch._dynamo")
    setattr(compiler, "disable", lambda fn, *args, **kwargs: fn)  # noqa: B010
    setattr(torch, "_dynamo", compiler)  # noqa: B010
    backend = TraceBackend(capabilities, pdl)
    try:
        with torch.inference_mode():
            trace(backend, TraceComm(comm.rank, comm.size))
    except Exception as error:
        sys.stderr.write(f"quire: kernels ahead of their launch: {type(error).__name__}: {error}\n")
    return found


class Precompile:
    """Compilation under way. `wait` before the first launch; `close` when there will be none."""

    def __init__(self, pid: int, answers: int) -> None:
        self._pid = pid
        self._answers = answers
        self._begin_s = time.monotonic()

    def wait(self, timeout_s: float = TIMEOUT_S) -> tuple[int, int, int]:
        """(compiled, from the cache, failed) at the end, or after `timeout_s` what there is by then."""
        answers = b""
        end_s = self._begin_s + timeout_s
        late = True
        while (left_s := end_s - time.monotonic()) > 0:
            if not select.select([self._answers], [], [], left_s)[0]:
                break
            if not (piece := os.read(self._answers, 65536)):
                late = False
                break
            answers += piece
        self.close()
        counts = answers.count(COMPILED), answers.count(CACHED), answers.count(FAILED)
        seconds = time.monotonic() - self._begin_s
        log.info("%d kernels compiled in %.1f s, %d from the cache", counts[0], seconds, counts[1])
        if late or counts[2]:
            why = f"not done after {timeout_s:.0f} s" if late else f"{counts[2]} failures"
            log.warning("kernels ahead of their launch: %s; the rest is compiled one by one", why)
        return counts

    def close(self) -> None:
        """End the processes; those that have ended already are only taken note of."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)  # compilers die with it; a zombie takes no harm
            os.waitpid(self._pid, 0)
            os.close(self._answers)
            self._pid = 0


def start(
    trace: Trace, capabilities: Any, target: GPUTarget, pdl: bool, comm: Comm, processes: int | None = None
) -> Precompile:
    """Begin to compile what `trace` launches on `target`, which need not be there. `processes`: None for this rank's
    share of the processors. Raises OSError when no process can be started."""
    answers, write = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(write)
        return Precompile(pid, answers)
    try:
        os.close(answers)
        _alone(parent)
        variants = collect(trace, capabilities, target, pdl, comm)[:MOST_JOBS]
        # Ranks want the same kernels: each begins elsewhere, and finds what the others have done in the cache.
        first = len(variants) * comm.rank // comm.size
        share = processes or max(1, len(os.sched_getaffinity(0)) // comm.size)
        _share(variants[first:] + variants[:first], write, min(share, len(variants)))
    except BaseException as error:
        sys.stderr.write(f"quire: kernels ahead of their launch: {type(error).__name__}: {error}\n")
        os.write(write, FAILED)
    finally:
        _end()


def _alone(parent: int) -> None:
    """Make this fork its own: it dies with its parent, and nothing of the parent's is run or collected here."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        _end()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    gc.disable()
    logging.disable()
    torch.set_num_threads(1)  # the parent's pool of threads did not come along, and waiting for it never ends


def _share(variants: list[Variant], answers: int, processes: int) -> None:
    """Compile in forked processes, each taking the next when it is free; answers one byte a variant."""
    jobs, write = os.pipe()
    os.write(write, b"".join(index.to_bytes(2, "little") for index in range(len(variants))))
    os.close(write)
    parent = os.getpid()
    children = []
    for _ in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        try:
            _alone(parent)
            while job := os.read(jobs, 2):
                _answer(variants[int.from_bytes(job, "little")], answers)
        finally:
            _end()
    os.close(answers)
    for child in children:
        os.waitpid(child, 0)


def _answer(variant: Variant, answers: int) -> None:
    try:
        os.write(answers, CACHED if variant.compile() else COMPILED)
    except Exception as error:
        sys.stderr.write(f"quire: {variant.fn.__name__}: {type(error).__name__}: {error}\n")
        os.write(answers, FAILED)


def _end() -> NoReturn:
    """Leave without the parent's exit handlers."""
    os._exit(0)
