"""`quire serve` before anything is started: what it refuses, what it says, and what it hides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from api.keys import Keys
from tools import serve


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--api-key", "two words"], "--api-key (1.): a key must be 1 to 256 printable ASCII characters"),
        (["--api-key-file", "{folder}/gone"], "--api-key-file: cannot read {folder}/gone: No such file or directory"),
        (["--api-key-file", "{folder}/empty"], "--api-key-file: {folder}/empty holds no key"),
        (["--ssl-certfile", "{folder}/gone"], "--ssl-certfile: cannot read {folder}/gone: No such file or directory"),
        (["--ssl-certfile", "{folder}/text"], "--ssl-certfile: {folder}/text holds no PEM certificate"),
        (["--client-address", "tcp://0.0.0.0:5"], "--client-address: must be an ipc:// address"),
        (["--client-address", "ipc://{folder}/text"], "--client-address: {folder}/text exists and is no socket"),
    ],
)
def test_one_sentence_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    def start(*_: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(serve, "resolve", start)
    monkeypatch.setattr(serve, "Supervisor", start)
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    monkeypatch.setattr(serve, "hide_secrets", lambda *_: None)  # of this very process
    (tmp_path / "text").write_text("precious")
    (tmp_path / "empty").write_text("# nobody yet\n")
    assert serve.main([part.replace("{folder}", str(tmp_path)) for part in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("quire serve: " + sentence.replace("{folder}", str(tmp_path)))
    assert "two words" not in line
    assert (tmp_path / "text").read_text() == "precious"


@pytest.mark.parametrize(
    ("host", "warned"),
    [("127.0.0.1", False), ("127.0.0.2", False), ("::1", False), ("0.0.0.0", True), ("::", True), ("192.0.2.7", True)],
)
def test_who_is_warned(capsys: pytest.CaptureFixture[str], host: str, warned: bool) -> None:
    serve.say_who_may_enter(Keys(), host)
    out = capsys.readouterr().out
    assert (f"whoever reaches {host}" in out) == warned
    serve.say_who_may_enter(Keys(["sk-1"]), host)
    out = capsys.readouterr().out
    assert "1; every route but /health needs one" in out
    assert "whoever" not in out
    assert "sk-1" not in out


def test_the_title_tells_no_secret() -> None:
    code = (
        "import sys; from core.config import parse; from tools.serve import hide_secrets\n"
        "argv = sys.argv[1:]; hide_secrets(parse(argv, {}), argv)\n"
        "print(open('/proc/self/cmdline').read())"
    )
    argv = ["--api-key", "sk-one", "--api-key=sk-one-longer", "--ssl-certfile", "c", "--ssl-keyfile-passw", "hush"]
    shown = subprocess.run(
        [sys.executable, "-P", "-c", code, *argv], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    assert "--api-key *** --api-key=*** --ssl-certfile c --ssl-keyfile-passw ***" in shown
    for secret in ("sk-one", "longer", "hush"):
        assert secret not in shown


def test_the_example_names_a_key_only_by_its_variable() -> None:
    assert "Authorization" not in serve.try_it("http://x", "m", False)
    assert '-H "Authorization: Bearer $QUIRE_API_KEY"' in serve.try_it("http://x", "m", True)
