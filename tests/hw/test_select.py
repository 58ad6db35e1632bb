"""Which backend serves: the table, the reasons, other distributions."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from core.errors import QuireError
from hw import select as module
from hw.cpu.backend import CpuBackend
from hw.select import BACKENDS, select


def fake(monkeypatch: pytest.MonkeyPatch, name: str, reason: str | None) -> object:
    """Install a backend module that is usable, or not for a reason; returns what its `make` gives."""
    made = object()
    stub = ModuleType(name)
    stub.available = lambda: reason  # type: ignore[attr-defined]
    stub.make = lambda rank, cache: made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, stub)
    return made


def test_auto_takes_the_first_that_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake(monkeypatch, BACKENDS["cuda"], None)
    assert select("auto") is made
    fake(monkeypatch, BACKENDS["cuda"], "no driver")
    assert isinstance(select("auto"), CpuBackend)
    assert isinstance(select("cpu"), CpuBackend)


def test_what_is_not_there_is_said_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, BACKENDS["cuda"], "no driver")
    with pytest.raises(QuireError, match="--device: 'cuda' cannot be used: no driver") as caught:
        select("cuda")
    assert (caught.value.code, caught.value.param) == ("invalid_config", "device")
    with pytest.raises(QuireError, match=r"'tpu' is not known; choose one of: auto, .*cpu"):
        select("tpu")


def test_other_distributions_add_backends_but_never_replace_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("npu", "npu_backend", module.ENTRY_POINTS), EntryPoint("cpu", "bad", module.ENTRY_POINTS)]
    monkeypatch.setattr(module, "entry_points", lambda group: points if group == "quire.backends" else [])
    made = fake(monkeypatch, "npu_backend", None)
    assert select("npu") is made
    assert select("auto") is made, "installed on purpose, so it goes first"
    assert isinstance(select("cpu"), CpuBackend)
    monkeypatch.setitem(sys.modules, "npu_backend", None)
    with pytest.raises(QuireError, match=r"'npu' cannot be used: .*npu_backend"):
        select("npu")
