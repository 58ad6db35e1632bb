"""RunDir: a server's private folder, <tmp>/quire-<uid>/<name>: sockets, config.json, model.json, server.json.

`quire.find_servers` reads the same places.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

from core.errors import QuireError

MAX_SOCKET_PATH = 100  # the kernel takes 107 bytes; the rest is for the socket's name


class RunDir:
    """Made private (0700) for this user; removed at the end."""

    def __init__(self, name: str) -> None:
        root = private_root()
        remove_stale(root)
        self.path = root / name
        check_length(self.path)
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(mode=0o700)

    def write(self, name: str, data: bytes) -> None:
        """Write a file that a reader sees whole or not at all."""
        part = self.path / (name + ".part")
        part.write_bytes(data)
        part.rename(self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        """As `write`."""
        self.write(name, json.dumps(value).encode())

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.path, ignore_errors=True)


def private_root() -> Path:
    """The folder of this user's servers, made when it is not there. Raises QuireError invalid_config."""
    root = Path(tempfile.gettempdir(), f"quire-{os.getuid()}")
    with contextlib.suppress(FileExistsError):  # also of a file or a link, which is refused below
        root.mkdir(mode=0o700)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise QuireError("invalid_config", f"{root} must be a folder of your own with mode 0700; remove it")
    return root


def check_length(folder: Path) -> None:
    """Raises QuireError invalid_config when sockets in `folder` would have too long a path."""
    if len(str(folder)) > MAX_SOCKET_PATH - len("/tokenizer-00"):
        raise QuireError("invalid_config", f"{folder} is too long for local sockets; set TMPDIR to a short path")


def remove_stale(root: Path) -> None:
    """Remove folders of servers that are dead: their supervisor's pid is gone."""
    for folder in root.iterdir():
        try:
            pid = int((folder / "pid").read_text())
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (OSError, ValueError):
            continue  # being made, or another's
