"""Certificates for tests, made by the openssl command; a test that needs one is skipped where there is none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

PASSWORD = "of-the-key"


class Certificate(NamedTuple):
    """PEM files: a self-signed certificate for 127.0.0.1, its key, and that key under PASSWORD."""

    cert: str
    key: str
    locked_key: str


def make_certificate(folder: Path, name: str = "server") -> Certificate:
    """Make one in `folder`."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to make a certificate with")
    made = Certificate(*(str(folder / f"{name}.{part}") for part in ("cert", "key", "locked")))
    _openssl(
        *("req", "-x509", "-newkey", "rsa:2048", "-noenc", "-days", "2", "-subj", f"/CN={name}"),
        *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", made.key, "-out", made.cert),
    )
    _openssl("pkcs8", "-topk8", "-in", made.key, "-out", made.locked_key, "-passout", f"pass:{PASSWORD}")
    return made


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
