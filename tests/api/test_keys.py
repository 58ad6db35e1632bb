"""Keys: every one is compared, the file is followed, and nothing ever says a key."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from hmac import compare_digest
from pathlib import Path

import pytest

import api.keys
from api.keys import Keys
from core.errors import QuireError


def loaded(given: Sequence[str], path: Path | str) -> Keys:
    keys = Keys(given, str(path))
    keys.load()
    return keys


def test_without_keys_none_is_required() -> None:
    keys = Keys()
    assert not keys.required
    assert keys.holder(b"anything") is None


def test_keys_of_both_sources(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# for the team\n\n  alice: key-of-alice  \nalice: second-of-alice\nplain\n")
    keys = loaded(["given"], file)
    assert keys.required
    assert len(keys) == 4
    assert keys.holder(b"key-of-alice") == keys.holder(b"second-of-alice") == "alice"
    assert keys.holder(b"plain") == "key-a116c9ed46d6"  # of SHA-256: the same in every process and after a restart
    assert (keys.holder(b"given") or "").startswith("key-")
    for wrong in (b"", b"give", b"given ", b"GIVEN", b"alice", b"# for the team", b"\xff", b"x" * 10_000):
        assert keys.holder(wrong) is None
    assert keys.holds("alice")
    assert not keys.holds("bob")


def test_every_key_is_compared_by_digests_of_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        lengths.append((len(one), len(other)))
        return compare_digest(one, other)

    monkeypatch.setattr(api.keys, "compare_digest", compare)
    keys = Keys([f"key{index}" * (index + 1) for index in range(7)])
    for asked in (b"key0", b"key6" * 7, b"nobody's", b""):
        lengths.clear()
        keys.holder(asked)
        assert lengths == [(32, 32)] * 7


def test_no_key_is_kept() -> None:
    keys = Keys(["very-secret"])
    assert "very-secret" not in repr(vars(keys))
    assert b"very-secret" not in b"".join(digest for digest, _ in keys._all)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("good\nbad key\n", "line 2: a key must be 1 to 256 printable ASCII characters"),
        ("schlüssel\n", "line 1: a key must be"),
        ("k" * 257, "line 1: a key must be"),
        ("n" * 65 + ": key\n", "line 1: a name must be"),
        ("\n".join(f"k{index}" for index in range(1001)), "1001 keys are too many"),
        ("#" * (1024 * 1024 + 1), "is larger than"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(QuireError) as caught:
        loaded([], file)
    assert caught.value.code == "invalid_config"
    assert words in caught.value.message
    assert "bad key" not in caught.value.message


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, words in (
        (str(tmp_path / "gone"), "No such file"),
        (str(tmp_path), "directory"),
        ("/dev/null", "must be a regular file"),
    ):
        with pytest.raises(QuireError, match=words):
            loaded(["a"], path)


def test_a_given_key_that_is_refused_is_not_told() -> None:
    for key in ("", "two words", "k" * 257):
        with pytest.raises(QuireError, match=r"--api-key \(2\.\): a key must be") as caught:
            Keys(["fine", key])
        assert "two words" not in caught.value.message


@contextlib.asynccontextmanager
async def watched(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setattr(api.keys, "CHECK_S", 0.01)
    task = asyncio.create_task(keys.watch())
    yield
    assert not task.done()
    task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_the_file_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "keys"
    file.write_text("first-key\n")
    keys = loaded(["given"], file)
    async with watched(keys, monkeypatch):
        file.write_text("alice: second-key\n")
        await until(lambda: keys.holder(b"second-key") == "alice")
        assert keys.holder(b"first-key") is None
        assert keys.holder(b"given") is not None

        replaced = tmp_path / "new"  # as editors and deployments write: a new file takes the old one's name
        replaced.write_text("third-key\n")
        replaced.rename(file)
        await until(lambda: keys.holder(b"third-key") is not None)

        file.unlink()
        await until(lambda: "No such file" in caplog.text)
        file.write_text("not a key\n")
        await until(lambda: "line 1: a key must be" in caplog.text)
        file.unlink()
        await until(lambda: caplog.text.count("No such file") == 2)
        assert keys.holder(b"third-key") is not None
        told = len(caplog.records)
        await asyncio.sleep(0.1)
        assert len(caplog.records) == told  # once for each trouble, not once for each look

        file.write_text("fourth-key\n")
        await until(lambda: keys.holder(b"fourth-key") is not None)
        assert keys.holder(b"third-key") is None
    for key in ("first-key", "second-key", "third-key", "fourth-key", "not a key", "given"):
        assert key not in caplog.text


async def test_an_emptied_file_locks_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("only\n")
    keys = loaded([], file)
    async with watched(keys, monkeypatch):
        file.write_text("")
        await until(lambda: len(keys) == 0)
        assert keys.required
        assert keys.holder(b"only") is None
        assert keys.holder(b"") is None


async def test_a_file_is_read_again_only_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n")
    reads: list[Path] = []
    read = api.keys._read

    def counted(path: Path) -> tuple[api.keys.Stamp, list[api.keys.Known]]:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(api.keys, "_read", counted)
    keys = loaded([], file)
    async with watched(keys, monkeypatch):
        await asyncio.sleep(0.1)
        assert len(reads) == 1
        found = file.stat()
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000_000))
        await until(lambda: len(reads) == 2)


async def test_before_it_is_loaded_nobody_enters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    keys = Keys([], str(file))
    assert keys.required
    with pytest.raises(QuireError, match="No such file"):
        keys.load()
    assert keys.holder(b"late") is None
    async with watched(keys, monkeypatch):
        file.write_text("late\n")
        await until(lambda: keys.holder(b"late") is not None)
