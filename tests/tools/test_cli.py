"""`quire`: the table of commands."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest

from tools import cli


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        assert cli.main(argv) == 0
        out, err = capsys.readouterr()
        assert not err
        for name, (_, text) in cli.COMMANDS.items():
            assert f"  {name:<8} {text}" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"quire {importlib.metadata.version('quire')}\n"


@pytest.mark.parametrize("word", ["sevre", "--verbose", ""])
def test_an_unknown_command_is_2_and_names_the_word(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert f"no command {word!r}" in err
    assert "serve" in err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main([command, "--help"])
    except SystemExit as end:  # argparse's way
        code = int(end.code or 0)
    assert code == 0
    assert f"usage: quire {command}" in capsys.readouterr().out


def test_exit_codes_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.find_servers", list)
    monkeypatch.setattr("tools.status.devices", list)
    assert cli.main(["status"]) == 1


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, json; from tools import cli; cli.main(['--help']); print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {name.partition(".")[0] for name in json.loads(out.splitlines()[-1])}
    assert loaded.isdisjoint({"torch", "transformers", "zmq", "msgspec", "rich", "starlette", "tokenizers", "numpy"})
