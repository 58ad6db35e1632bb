"""OpenAI's error object, in which every error of the HTTP door is written."""

from __future__ import annotations

import msgspec

from core.errors import QuireError, error_type


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


def error_body(error: QuireError) -> bytes:
    """The JSON of an error."""
    detail = ErrorDetail(error.message, error_type(error.code), error.param, error.code)
    return msgspec.json.encode(ErrorBody(detail))
