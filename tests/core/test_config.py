"""Config: precedence, and errors that name the option, the value and the fix."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from core.config import Config, parse, without_secrets
from core.errors import QuireError


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    path = tmp_path / "quire.toml"
    path.write_text("port = 1\nmax_num_seqs = 2\ndtype = 'bfloat16'\n")
    environment = {"QUIRE_PORT": "3", "QUIRE_MAX_NUM_SEQS": "4", "UNRELATED": "x"}
    config = parse(["--config", str(path), "--port", "5"], environment)
    assert (config.port, config.max_num_seqs, config.dtype, config.host) == (5, 4, "bfloat16", "127.0.0.1")


def test_every_field_has_a_flag_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], {})
    text = capsys.readouterr().out
    for field in msgspec.structs.fields(Config):
        if field.name != "model":
            assert "--" + field.name.replace("_", "-") in text.replace("no-", "")


def test_booleans_and_the_model() -> None:
    config = parse(["some/model", "--no-prefix-caching", "--strict-fields"], {})
    assert (config.model, config.prefix_caching, config.strict_fields) == ("some/model", False, True)
    assert parse([], {"QUIRE_STRICT_FIELDS": "true"}).strict_fields


def test_json_round_trip() -> None:
    config = parse(["--kv-gib", "0.5", "--max-model-len", "77"], {})
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--port", "abc"], ["--port", "int", "'abc'"]),
        (["--port", "99999"], ["--port", "65535", "'99999'"]),
        (["--kv-gib", "-1"], ["--kv-gib", "above 0"]),
        (["--kv-gib", "nan"], ["--kv-gib", "above 0"]),
        (["--block-size", "7"], ["--block-size", "16", "7"]),
        (["--config", "/no/such.toml"], ["--config", "No such file"]),
        (["--client-address", "tcp://1.2.3.4:5"], ["--client-address", "ipc://", "tcp://1.2.3.4:5"]),
        (["--ssl-keyfile", "key.pem"], ["--ssl-keyfile", "--ssl-certfile", "key.pem"]),
        (["--cors-origin", "example.org"], ["--cors-origin", "https://host:port", "example.org"]),
        (["--cors-origin", "https://example.org/"], ["--cors-origin", "without a path"]),
        (["--cors-origin", "*", "--cors-origin", "https://*.org"], ["--cors-origin", "https://*.org"]),
    ],
)
def test_errors(argv: list[str], words: list[str]) -> None:
    with pytest.raises(QuireError) as caught:
        parse(argv, {})
    assert caught.value.code == "invalid_config"
    for word in words:
        assert word in caught.value.message


def test_an_unknown_key_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "quire.toml"
    path.write_text("prot = 1\n")
    with pytest.raises(QuireError, match="prot: unknown option"):
        parse(["--config", str(path)], {})
    path.write_text("port = = 1\n")
    with pytest.raises(QuireError, match="not valid TOML"):
        parse(["--config", str(path)], {})


def test_keys_from_flags_the_environment_and_a_file(tmp_path: Path) -> None:
    environment = {"QUIRE_API_KEY": "c, d,"}
    assert parse([], environment).api_key == ("c", "d")
    assert parse(["--api-key", "a", "--api-key=b,b"], environment).api_key == ("a", "b,b")
    path = tmp_path / "quire.toml"
    path.write_text("api_key = ['e', 'f']\ncors_origin = 'https://one.example,http://localhost:3000'\n")
    config = parse(["--config", str(path)], {})
    assert config.api_key == ("e", "f")
    assert config.cors_origin == ("https://one.example", "http://localhost:3000")


@pytest.mark.parametrize("value", ["", " ", ","])
def test_an_empty_key_variable_opens_nothing(value: str) -> None:
    with pytest.raises(QuireError, match="QUIRE_API_KEY: is set but empty"):
        parse([], {"QUIRE_API_KEY": value})


def test_secrets_stay_where_they_belong() -> None:
    argv = ["--api-key", "sk-1", "--api-key", "sk-2", "--ssl-certfile", "c", "--ssl-keyfile-password", "pass-3"]
    config = parse([*argv, "--port", "7"], {})
    assert sorted(config.secrets()) == ["pass-3", "sk-1", "sk-2"]
    public = config.without_secrets()
    assert public == parse(["--ssl-certfile", "c", "--port", "7"], {})
    for secret in config.secrets():
        assert secret not in repr(public)
    environment = {"QUIRE_API_KEY": "x", "QUIRE_SSL_KEYFILE_PASSWORD": "y", "QUIRE_PORT": "1", "HOME": "/h"}
    assert without_secrets(environment) == {"QUIRE_PORT": "1", "HOME": "/h"}


@pytest.mark.parametrize(
    ("argv", "toml"),
    [(["--ssl-keyfile-password", "hush"], ""), ([], "api_key = {hush = 'hush'}"), ([], "api_key = [['hush']]")],
)
def test_errors_do_not_tell_secrets(tmp_path: Path, argv: list[str], toml: str) -> None:
    path = tmp_path / "quire.toml"
    path.write_text(toml)
    with pytest.raises(QuireError) as caught:
        parse(["--config", str(path), *argv], {})
    assert "hush" not in caught.value.message
