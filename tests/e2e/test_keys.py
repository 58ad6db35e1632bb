"""A real server with keys and TLS: who gets in by each door, and where no key can be read."""

from __future__ import annotations

import contextlib
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

import quire
from tests.api.certificates import PASSWORD, make_certificate
from tests.e2e.serving import Server, serving

IN_ENVIRONMENT = "sk-environment-5cf1"
IN_FILE = "sk-file-90aa"
NEW_IN_FILE = "sk-file-new-77d0"
SECRETS = (IN_ENVIRONMENT, IN_FILE, NEW_IN_FILE, PASSWORD)


class Locked:
    """The server, its key file, and what a client needs to trust its certificate."""

    def __init__(self, server: Server, key_file: Path, trust: ssl.SSLContext) -> None:
        self.server = server
        self.key_file = key_file
        self.trust = trust

    @property
    def facts(self) -> dict[str, object]:
        return next(found for found in quire.find_servers() if found["pid"] == self.server.pid)

    @property
    def run_dir(self) -> Path:
        return Path(str(self.facts["client_address"]).removeprefix("ipc://")).parent

    @contextlib.contextmanager
    def openai(self, key: str) -> Iterator[openai.OpenAI]:
        trusting: Any = httpx.Client(verify=self.trust)  # versions of the SDK differ in whose type they name
        url = self.server.url + "/v1"
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0, http_client=trusting) as client:
            yield client

    def status(self, path: str, key: str) -> int:
        headers = {"x-api-key": key} if key else {}
        return httpx.get(self.server.url + path, headers=headers, verify=self.trust).status_code


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    folder = tmp_path_factory.mktemp("keys")
    certificate = make_certificate(folder)
    key_file = folder / "keys.txt"
    key_file.write_text(f"# ours\nalice: {IN_FILE}\n")
    options = [
        *("--device", "null", "--log-level", "debug", "--api-workers", "2", "--api-key-file", str(key_file)),
        *("--ssl-certfile", certificate.cert, "--ssl-keyfile", certificate.locked_key),
        *("--ssl-keyfile-password", PASSWORD),
    ]
    with serving(folder, *options, environment={"QUIRE_API_KEY": IN_ENVIRONMENT}) as server:
        yield Locked(server, key_file, ssl.create_default_context(cafile=certificate.cert))


@pytest.mark.parametrize("key", [IN_ENVIRONMENT, IN_FILE])
def test_openai_client_with_a_key(locked: Locked, key: str) -> None:
    with locked.openai(key) as client:
        answer = client.chat.completions.create(
            model="tiny-chat", messages=[{"role": "user", "content": "hi"}], max_tokens=5
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        stream = client.completions.create(model="tiny-chat", prompt="a", max_tokens=5, stream=True)
        assert [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1] == "length"


def test_openai_client_with_a_wrong_key(locked: Locked) -> None:
    with locked.openai("wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.chat.completions.create(model="tiny-chat", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "invalid_api_key"
    for path in ("/metrics", "/stats", "/version", "/v1/models"):
        assert locked.status(path, "") == 401
        assert locked.status(path, IN_FILE) == 200
    assert locked.status("/health", "") == 200


def test_zeromq_with_and_without_a_key(locked: Locked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    address = str(locked.facts["client_address"])
    sampling = quire.SamplingParams(max_tokens=4)
    with quire.Client(address, timeout_s=30, api_key=IN_FILE) as client:
        assert client.generate(None, "abc", sampling=sampling).completion_tokens == 4
    for key in (None, "wrong"):
        with quire.Client(address, timeout_s=30, api_key=key) as client, pytest.raises(quire.QuireError) as caught:
            client.generate(None, "abc", sampling=sampling)
        assert caught.value.code == "invalid_api_key"


def test_commands_take_the_key_from_the_environment(locked: Locked) -> None:
    def status(key: str) -> str:
        command = [sys.executable, "-P", "-m", "tools.cli", "status", "--json", "--interval", "0.1"]
        environment = {**os.environ, "QUIRE_API_KEY": key}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout

    assert '"state": "ready"' in status(f"{IN_FILE},ignored")
    assert "the API key is missing or wrong" in status("")


def test_a_changed_file_counts_without_a_restart(locked: Locked) -> None:
    former = locked.key_file.read_text()
    locked.key_file.write_text(f"bob: {NEW_IN_FILE}\n")
    try:
        # Both api processes follow the file, each at its own time.
        deadline = time.monotonic() + 20
        agreed = 0
        while agreed < 10:
            assert time.monotonic() < deadline
            seen = [locked.status("/version", key) for key in (NEW_IN_FILE, IN_FILE, IN_ENVIRONMENT)]
            agreed = agreed + 1 if seen == [200, 401, 200] else 0
            time.sleep(0.05)
    finally:
        locked.key_file.write_text(former)
    deadline = time.monotonic() + 20
    agreed = 0
    while agreed < 10:
        assert time.monotonic() < deadline
        agreed = agreed + 1 if locked.status("/version", IN_FILE) == 200 else 0
        time.sleep(0.05)


def test_no_secret_can_be_read_anywhere(locked: Locked) -> None:
    with locked.openai("wrong-but-secret") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    headers = {"x-api-key": IN_ENVIRONMENT}
    pages = [
        httpx.get(locked.server.url + path, headers=headers, verify=locked.trust).text
        for path in ("/stats", "/metrics")
    ]
    processes = [psutil.Process(locked.server.pid), *locked.server.children().values()]
    assert len(processes) == 6
    arguments = [" ".join(process.cmdline()) for process in processes]
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout if _has_ps() else ""
    files = [path.read_text() for path in locked.run_dir.iterdir() if path.is_file()]
    assert any('"api_key_file"' in content for content in files)
    log = locked.server.log.read_text()
    assert "ready after" in log
    everything = "\n".join([*pages, *arguments, listed, *files, log])
    for secret in (*SECRETS, "wrong-but-secret"):
        assert secret not in everything


def test_only_the_owner_may_open_the_sockets(locked: Locked) -> None:
    assert locked.run_dir.stat().st_mode & 0o777 == 0o700
    sockets = [path for path in locked.run_dir.iterdir() if path.is_socket()]
    assert "client" in {path.name for path in sockets}
    assert {path.stat().st_mode & 0o777 for path in sockets} == {0o600}


def test_an_api_process_that_comes_back_has_the_keys(locked: Locked) -> None:
    former = locked.key_file.read_text()
    locked.key_file.unlink()  # no reason not to come back
    old = locked.server.children()["api 1"]
    old.kill()
    deadline = time.monotonic() + 30
    while True:
        assert time.monotonic() < deadline
        new = locked.server.children().get("api 1")
        if new is not None and new.pid != old.pid:
            break
        time.sleep(0.1)
    locked.server.children()["api 0"].suspend()  # so that the new one answers
    try:
        assert httpx.get(locked.server.url + "/version", verify=locked.trust, timeout=20).status_code == 401
        headers = {"authorization": f"Bearer {IN_ENVIRONMENT}"}
        answer = httpx.get(locked.server.url + "/version", headers=headers, verify=locked.trust, timeout=20)
        assert answer.status_code == 200
    finally:
        locked.server.children()["api 0"].resume()
        locked.key_file.write_text(former)


def test_llm_keeps_its_key_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.setenv("TMPDIR", name)
        with quire.LLM(device="null", api_key="sk-llm-31") as llm:
            (result,) = llm.generate("abc", quire.SamplingParams(max_tokens=3), progress=False)
            assert result.completion_tokens == 3
            (server,) = quire.find_servers()
            assert httpx.get(server["url"] + "/v1/models").status_code == 401
            assert "sk-llm-31" not in " ".join(psutil.Process(server["pid"]).cmdline())


def _has_ps() -> bool:
    return any(Path(folder, "ps").exists() for folder in os.environ["PATH"].split(os.pathsep))
