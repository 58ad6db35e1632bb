"""RunDir: private, one per server, and the dead ones' folders are cleared away."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import QuireError
from tools.run_dir import RunDir


@pytest.fixture
def tmp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of the test's own, with a short path, in the place of /tmp."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def root(tmp: Path) -> Path:
    return tmp / f"quire-{os.getuid()}"


def dead_pid() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


def test_private_whatever_the_umask(root: Path) -> None:
    before = os.umask(0)
    try:
        run_dir = RunDir("8000")
    finally:
        os.umask(before)
    assert run_dir.path == root / "8000"
    assert {oct(path.stat().st_mode & 0o777) for path in (root, run_dir.path)} == {"0o700"}


def test_files_are_written_whole(root: Path) -> None:
    run_dir = RunDir("8000")
    run_dir.write("pid", b"12")
    run_dir.write_json("server.json", {"url": None, "pid": 12})
    assert (run_dir.path / "pid").read_bytes() == b"12"
    assert json.loads((run_dir.path / "server.json").read_text()) == {"url": None, "pid": 12}
    assert {path.name for path in run_dir.path.iterdir()} == {"pid", "server.json"}  # and no half-written part


def test_remove_leaves_nothing(root: Path) -> None:
    run_dir = RunDir("8000")
    run_dir.write("pid", b"12")
    run_dir.remove()
    assert list(root.iterdir()) == []
    run_dir.remove()  # twice is harmless


def test_only_folders_of_dead_servers_are_cleared(root: Path) -> None:
    root.mkdir(mode=0o700)
    for name, text in (("dead", str(dead_pid())), ("live", str(os.getpid())), ("starting", None), ("odd", "no pid")):
        (root / name).mkdir()
        if text is not None:
            (root / name / "pid").write_text(text)
    (root / "dead" / "workers").write_text("a socket")
    RunDir("8000")
    assert {path.name for path in root.iterdir()} == {"live", "starting", "odd", "8000"}


def test_a_folder_of_the_same_name_is_begun_anew(root: Path) -> None:
    root.mkdir(mode=0o700)
    (root / "8000").mkdir()
    (root / "8000" / "scheduler").write_text("an old socket")
    assert list(RunDir("8000").path.iterdir()) == []


def test_a_path_too_long_for_sockets_is_refused(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(QuireError, match="too long for local sockets; set TMPDIR to a short path") as caught:
        RunDir("8000")
    assert caught.value.code == "invalid_config"
    assert not (deep / f"quire-{os.getuid()}" / "8000").exists()


def test_a_root_open_to_others_is_refused(root: Path) -> None:
    root.mkdir()
    root.chmod(0o755)
    with pytest.raises(QuireError, match="must be a folder of your own with mode 0700"):
        RunDir("8000")
    assert list(root.iterdir()) == []


def test_a_link_as_root_is_refused(root: Path, tmp: Path) -> None:
    (tmp / "elsewhere").mkdir(mode=0o700)
    root.symlink_to(tmp / "elsewhere")
    with pytest.raises(QuireError, match="must be a folder of your own"):
        RunDir("8000")
    assert list((tmp / "elsewhere").iterdir()) == []


def test_a_file_as_root_is_refused(root: Path) -> None:
    root.write_text("no folder")
    with pytest.raises(QuireError, match="must be a folder of your own"):
        RunDir("8000")


def test_another_users_root_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.getuid()
    (root.parent / f"quire-{mine + 1}").mkdir(mode=0o700)  # by me, at the place of the next user
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(QuireError, match="must be a folder of your own"):
        RunDir("8000")
