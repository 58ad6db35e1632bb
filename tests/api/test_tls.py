"""TLS: what is wrong with the files in one sentence, and a door that speaks nothing else."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from api.tls import server_context
from core.config import Config
from core.errors import QuireError
from tests.api.certificates import PASSWORD, Certificate, make_certificate
from tests.api.serving import TEXT, doors

BODY = {"model": "tiny-chat", "prompt": "abc"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"), "other")


def tls_of(certificate: Certificate, **options: Any) -> ssl.SSLContext:
    context = server_context(Config(ssl_certfile=certificate.cert, ssl_keyfile=certificate.key, **options))
    assert context is not None
    return context


def refusal(**options: Any) -> str:
    with pytest.raises(QuireError) as caught:
        server_context(Config(**options))
    assert caught.value.code == "invalid_config"
    assert PASSWORD not in caught.value.message
    return caught.value.message


def test_files_that_are_not_there(certificate: Certificate, tmp_path: Path) -> None:
    assert server_context(Config()) is None
    gone = str(tmp_path / "gone.pem")
    assert refusal(ssl_certfile=gone) == f"--ssl-certfile: cannot read {gone}: No such file or directory"
    assert "--ssl-keyfile: cannot read" in refusal(ssl_certfile=certificate.cert, ssl_keyfile=gone)
    files = {"ssl_certfile": certificate.cert, "ssl_keyfile": certificate.key}
    assert "--ssl-ca-certs: cannot read" in refusal(**files, ssl_ca_certs=gone)
    assert "Is a directory" in refusal(ssl_certfile=str(tmp_path))


def test_files_that_are_wrong(certificate: Certificate, other: Certificate, tmp_path: Path) -> None:
    cert, key, locked = certificate
    assert refusal(ssl_certfile=key) == f"--ssl-certfile: {key} holds no PEM certificate"
    assert refusal(ssl_certfile=cert) == f"--ssl-keyfile: {cert} holds no PEM private key"
    assert "is not that of the certificate" in refusal(ssl_certfile=cert, ssl_keyfile=other.key)
    for password in (None, "wrong"):
        text = refusal(ssl_certfile=cert, ssl_keyfile=locked, ssl_keyfile_password=password)
        assert text == f"--ssl-keyfile-password: is missing, or not the password of {locked}"
    torn = tmp_path / "torn.key"
    torn.write_text(Path(key).read_text()[:300] + "\n-----END PRIVATE KEY-----\n")
    assert "is damaged" in refusal(ssl_certfile=cert, ssl_keyfile=str(torn))
    assert "holds no PEM certificate" in refusal(ssl_certfile=cert, ssl_keyfile=key, ssl_ca_certs=key)


def test_a_locked_key_and_one_file_with_both(certificate: Certificate, tmp_path: Path) -> None:
    locked = Config(ssl_certfile=certificate.cert, ssl_keyfile=certificate.locked_key, ssl_keyfile_password=PASSWORD)
    assert server_context(locked) is not None
    both = tmp_path / "both.pem"
    both.write_text(Path(certificate.cert).read_text() + Path(certificate.key).read_text())
    assert server_context(Config(ssl_certfile=str(both))) is not None


def test_https(certificate: Certificate, folder: Path) -> None:
    trusting = ssl.create_default_context(cafile=certificate.cert)
    with doors(folder, tls=tls_of(certificate)) as (running, _):
        with httpx.Client(verify=trusting) as client:
            for _ in range(2):
                answer = client.post(running.url + "/v1/completions", json=BODY)
                assert answer.json()["choices"][0]["text"] == TEXT
            with client.stream("POST", running.url + "/v1/completions", json={**BODY, "stream": True}) as stream:
                assert "".join(stream.iter_text()).endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(running.url + "/health")
        with pytest.raises(httpx.TransportError):
            httpx.get(running.url.replace("https:", "http:") + "/health")
        old = ssl.create_default_context(cafile=certificate.cert)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert httpx.get(running.url + "/health", verify=old).status_code == 200


def test_connections_without_a_handshake_hold_nobody_up(certificate: Certificate, folder: Path) -> None:
    trusting = ssl.create_default_context(cafile=certificate.cert)
    with doors(folder, tls=tls_of(certificate)) as (running, _):
        place = urlsplit(running.url)
        assert place.port is not None
        silent = [socket.create_connection((str(place.hostname), place.port)) for _ in range(20)]
        silent[0].sendall(b"\x16\x03\x01nonsense" * 10)
        assert httpx.get(running.url + "/health", verify=trusting).status_code == 200
        for connection in silent:
            connection.close()
        assert httpx.get(running.url + "/health", verify=trusting).status_code == 200


def test_client_certificates(certificate: Certificate, other: Certificate, folder: Path) -> None:
    with doors(folder, tls=tls_of(certificate, ssl_ca_certs=other.cert)) as (running, _):
        known = ssl.create_default_context(cafile=certificate.cert)
        known.load_cert_chain(other.cert, other.key)
        assert httpx.get(running.url + "/health", verify=known).status_code == 200
        nobody = ssl.create_default_context(cafile=certificate.cert)
        stranger = ssl.create_default_context(cafile=certificate.cert)
        stranger.load_cert_chain(certificate.cert, certificate.key)
        for context in (nobody, stranger):
            with pytest.raises(httpx.TransportError):
                httpx.get(running.url + "/health", verify=context)
