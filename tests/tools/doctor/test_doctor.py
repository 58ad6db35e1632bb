"""`quire doctor` as its users call it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from core.config import Config
from tools.doctor import __main__ as doctor
from tools.doctor.finding import Diagnosis, Finding, diagnosis

OK = Finding("torch", "ok", "torch 2.11.0")
WARNING = Finding("open files", "warning", "1,024 open files", "ulimit -n 4352")
PROBLEM = Finding("port", "problem", "127.0.0.1:8000 is taken", "choose another --port")


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `examine` is given and, under "findings", answers."""
    seen: dict[str, Any] = {"findings": [OK, WARNING]}

    def examine(config: Config) -> list[Finding]:
        seen["config"] = config
        return list(seen["findings"])

    monkeypatch.setattr(doctor, "examine", examine)
    return seen


def test_the_exit_code_tells_problems_from_warnings(
    examined: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main([]) == 0
    assert "0 problems, 1 warning" in capsys.readouterr().out
    examined["findings"].append(PROBLEM)
    assert doctor.main([]) == 1
    assert "1 problem, 1 warning" in capsys.readouterr().out


def test_options_of_serve_are_what_is_checked(examined: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["owner/name", "--port", "8001", "--json", "--tensor-parallel-size", "2"]) == 0
    config = examined["config"]
    assert (config.model, config.port, config.tensor_parallel_size) == ("owner/name", 8001, 2)
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert doctor.main(["--tensor-parallel-size", "0"]) == 2
    assert "--tensor-parallel-size" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        doctor.main(["--no-such-option"])
    assert end.value.code == 2


def test_json_and_its_schema(examined: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    examined["findings"].append(PROBLEM)
    assert doctor.main(["--json"]) == 1
    found = msgspec.json.decode(capsys.readouterr().out, type=Diagnosis)
    assert (found.ok, found.findings) == (False, [OK, WARNING, PROBLEM])
    assert doctor.main(["--json-schema"]) == 0
    definitions = json.loads(capsys.readouterr().out)["$defs"]
    assert set(definitions["Diagnosis"]["properties"]) == {"schema_version", "ok", "findings"}
    assert set(definitions["Finding"]["properties"]) == {"name", "status", "text", "fix"}


def test_the_table_has_every_finding_with_its_fix() -> None:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed below
    console.print(doctor.draw(diagnosis([OK, WARNING, PROBLEM])))
    console.file.close()
    page = console.export_text()
    for finding in (OK, WARNING, PROBLEM):
        for part in (finding.name, finding.status, finding.text, finding.fix):
            assert part in page


def test_this_machine_is_examined_in_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = {finding.name: finding for finding in doctor.examine(Config(device="cpu", port=0, cache_dir=str(tmp_path)))}
    assert set(found) == {
        "python", "torch", "triton", "cuda", "c compiler", "driver", "processors", "open files", "shared memory",
        "sockets", "port", "kernel cache", "disk", "downloads", "hub",
    }  # fmt: skip
    assert found["torch"].status == "ok"
    assert (found["hub"].status, found["driver"].status) == ("skipped", "skipped")
    assert all(finding.fix for finding in found.values() if finding.status in ("warning", "problem"))
