"""Keys: who may use the doors. API keys from the configuration, and from a file that may change meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from hmac import compare_digest
from pathlib import Path

from core.errors import QuireError

log = logging.getLogger("quire.api")

CHECK_S = 1.0
MAX_KEYS = 1000  # every request is compared with each of them: some 40 µs
MAX_KEY_CHARS = 256
MAX_FILE_BYTES = 1024 * 1024

Stamp = tuple[int, int, int]
Known = tuple[bytes, str]  # SHA-256 of a key, and whose it is


class Keys:
    """What opens the doors. Holds digests only, never a key.

    Args:
        given: the keys of the configuration.
        path: a file with a key on each line, `KEY` or `NAME: KEY`; empty lines and those with `#` first are skipped.
            Nobody enters by it before `load`.

    Raises QuireError("invalid_config") for a given key that cannot be one; no error ever tells a key.
    """

    def __init__(self, given: Sequence[str] = (), path: str | None = None) -> None:
        self._given = [_known(key, f"--api-key ({index + 1}.)") for index, key in enumerate(given)]
        self._path = None if path is None else Path(path)
        self._stamp: Stamp | None = None
        self._trouble = ""
        self._all = self._given

    def __len__(self) -> int:
        return len(self._all)

    @property
    def required(self) -> bool:
        """Whether clients need a key. A file that has become empty locks everybody out; it does not let them in."""
        return bool(self._given) or self._path is not None

    def holder(self, key: bytes) -> str | None:
        """Whose key this is: the name in the file, or a short hash. None: nobody's.

        Every known key is compared, each in constant time, so that the time taken tells nothing.
        """
        if len(key) > MAX_KEY_CHARS:
            return None
        digest = hashlib.sha256(key).digest()
        found = None
        for known, name in self._all:
            if compare_digest(digest, known):
                found = name
        return found

    def holds(self, holder: str) -> bool:
        """Whether a holder still has a key."""
        return any(name == holder for _, name in self._all)

    def load(self) -> None:
        """Read the file. Raises QuireError("invalid_config"), which names the file and the line at fault."""
        if self._path is not None:
            stamp, from_file = _read(self._path)
            self._use(from_file)
            self._stamp = stamp

    async def watch(self) -> None:
        """Follow the file until cancelled. What cannot be read is logged, and the former keys stay."""
        while self._path is not None:
            await asyncio.sleep(CHECK_S)
            try:
                news = await asyncio.to_thread(_read_if_changed, self._path, self._stamp)
                if news is not None:
                    self._use(news[1])
                    self._stamp = news[0]
                    log.info("%s: %d API keys from now on", self._path, len(self))
                self._trouble = ""
            except QuireError as error:
                if error.message != self._trouble:
                    log.error("%s; the former keys stay", error.message)
                self._trouble = error.message

    def _use(self, from_file: list[Known]) -> None:
        known = self._given + from_file
        if len(known) > MAX_KEYS:
            text = f"--api-key-file: {len(known)} keys are too many; at most {MAX_KEYS}"
            raise QuireError("invalid_config", text, "api_key_file")
        self._all = known


def _known(key: str, where: str, name: str = "") -> Known:
    if not 0 < len(key) <= MAX_KEY_CHARS or not all(32 < ord(letter) < 127 for letter in key):
        text = f"{where}: a key must be 1 to {MAX_KEY_CHARS} printable ASCII characters without spaces"
        raise QuireError("invalid_config", text, "api_key")
    digest = hashlib.sha256(key.encode())
    return digest.digest(), name or f"key-{digest.hexdigest()[:12]}"


def _read_if_changed(path: Path, stamp: Stamp | None) -> tuple[Stamp, list[Known]] | None:
    try:
        now = _stamp(path.stat())
    except OSError as error:
        raise _unreadable(path, error) from None
    return None if now == stamp else _read(path)


def _read(path: Path) -> tuple[Stamp, list[Known]]:
    """The file's keys. Raises QuireError("invalid_config")."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise QuireError("invalid_config", f"--api-key-file: {path} must be a regular file", "api_key_file")
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(content) > MAX_FILE_BYTES:
        text = f"--api-key-file: {path} is larger than {MAX_FILE_BYTES} bytes"
        raise QuireError("invalid_config", text, "api_key_file")
    return _stamp(found), list(_parse(path, content.decode("utf-8", "replace")))


def _parse(path: Path, text: str) -> Iterator[Known]:
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"--api-key-file: {path}, line {number}"
        name, separator, key = line.rpartition(": ")
        if separator and not (0 < len(name) <= 64 and name.isprintable()):
            raise QuireError("invalid_config", f"{where}: a name must be 1 to 64 printable characters", "api_key_file")
        yield _known(key.strip(), where, name)


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_mtime_ns, found.st_size, found.st_ino


def _unreadable(path: Path, error: OSError) -> QuireError:
    return QuireError("invalid_config", f"--api-key-file: cannot read {path}: {error.strerror}", "api_key_file")
