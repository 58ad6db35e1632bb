"""tls: the SSL context of the HTTP door, made from PEM files; what is wrong with them is said in one sentence."""

from __future__ import annotations

import ssl
from pathlib import Path

from core.config import Config
from core.errors import QuireError


def server_context(config: Config) -> ssl.SSLContext | None:
    """TLS 1.2 or newer with the configured certificate; None without one. Raises QuireError("invalid_config")."""
    if config.ssl_certfile is None:
        return None
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        if (path := getattr(config, name)) is not None:
            _check_readable(name, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without any password OpenSSL would ask at the terminal.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, config.ssl_keyfile_password or "")
    except ssl.SSLError as error:
        raise QuireError("invalid_config", _explained(config, error), "ssl_certfile") from None
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except ssl.SSLError:
            text = f"--ssl-ca-certs: {config.ssl_ca_certs} holds no PEM certificate"
            raise QuireError("invalid_config", text, "ssl_ca_certs") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(name: str, path: str) -> None:
    try:
        Path(path).open("rb").close()
    except OSError as error:
        text = f"--{name.replace('_', '-')}: cannot read {path}: {error.strerror}"
        raise QuireError("invalid_config", text, name) from None


def _explained(config: Config, error: ssl.SSLError) -> str:
    """OpenSSL names neither the file nor, mostly, the reason."""
    certfile = str(config.ssl_certfile)
    keyfile = config.ssl_keyfile or certfile
    key = Path(keyfile).read_text("ascii", "replace")
    if "-----BEGIN CERTIFICATE-----" not in Path(certfile).read_text("ascii", "replace"):
        return f"--ssl-certfile: {certfile} holds no PEM certificate"
    if "PRIVATE KEY-----" not in key:
        return f"--ssl-keyfile: {keyfile} holds no PEM private key"
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"--ssl-keyfile: the key in {keyfile} is not that of the certificate in {certfile}"
    if "ENCRYPTED" in key:
        return f"--ssl-keyfile-password: is missing, or not the password of {keyfile}"
    return f"--ssl-certfile: {certfile} or its key in {keyfile} is damaged"
