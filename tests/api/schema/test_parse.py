"""Parsing a body: unknown fields are named once, depth is bounded, paths become params."""

from __future__ import annotations

import logging

import msgspec
import pytest

from api.schema import parse as module
from api.schema.parse import MAX_DEPTH, parse
from core.errors import QuireError


class Inner(msgspec.Struct):
    b: int


class Body(msgspec.Struct):
    a: list[Inner] = []
    free: object = None


def refused(body: bytes, *, strict: bool = False) -> QuireError:
    with pytest.raises(QuireError) as caught:
        parse(body, Body, strict_fields=strict)
    return caught.value


def test_a_path_becomes_the_param() -> None:
    error = refused(b'{"a": [{"b": 1}, {"b": "x"}]}')
    assert (error.code, error.param) == ("invalid_type", "a[1].b")
    assert error.message == "a[1].b: expected `int`, got `str`"
    error = refused(b'{"a": [{"b": 1}, {}]}')
    assert (error.code, error.param, error.message) == ("missing_field", "a[1].b", "a[1].b is missing")


def test_unknown_fields_warn_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_warned", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            body, raw = parse(b'{"a": [], "zzz": 1}', Body, strict_fields=False)
    assert body == Body()
    assert raw == {"a": [], "zzz": 1}
    assert [record.getMessage().count("'zzz'") for record in caplog.records] == [1]
    error = refused(b'{"zzz": 1}', strict=True)
    assert (error.code, error.param) == ("unknown_field", "zzz")


def test_warnings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_warned", set())
    for index in range(1100):
        parse(b'{"f%d": 1}' % index, Body, strict_fields=False)
    assert len(module._warned) == 1000


@pytest.mark.parametrize("opening", [b"[", b'{"x":'])
def test_depth(opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"

    def body(depth: int) -> bytes:
        inner = b"1" if opening != b"[" else b""
        return b'{"free":' + opening * depth + inner + closing * depth + b"}"

    parse(body(MAX_DEPTH), Body, strict_fields=False)
    assert refused(body(MAX_DEPTH + 1)).code == "invalid_json"
    assert refused(body(100_000)).code == "invalid_json"


def test_depth_behind_a_number() -> None:
    assert refused(b'{"free": [1, ' + b"[" * 100 + b"]" * 100 + b"]}").code == "invalid_json"
