"""Every error that a client can see, in one table: code -> (HTTP status, OpenAI error type).

Codes are stable: clients and dashboards key on them. Raise `QuireError(code, message, param)`; the message names the
field, the value and the fix.
"""

from __future__ import annotations

from quire import QuireError

__all__ = ["CODES", "QuireError", "error_type", "http_status"]

CODES: dict[str, tuple[int, str]] = {
    # The request is wrong; sending it again unchanged cannot help.
    "invalid_request": (400, "invalid_request_error"),
    "invalid_json": (400, "invalid_request_error"),
    "invalid_value": (400, "invalid_request_error"),
    "invalid_type": (400, "invalid_request_error"),
    "missing_field": (400, "invalid_request_error"),
    "unknown_field": (400, "invalid_request_error"),
    "unsupported": (400, "invalid_request_error"),
    "template_error": (400, "invalid_request_error"),
    "invalid_grammar": (400, "invalid_request_error"),
    "context_length_exceeded": (400, "invalid_request_error"),
    "invalid_api_key": (401, "authentication_error"),
    "not_found": (404, "invalid_request_error"),
    "model_not_found": (404, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "body_too_large": (413, "invalid_request_error"),
    "head_too_large": (431, "invalid_request_error"),
    # The server cannot take it now; try again later.
    "queue_full": (429, "rate_limit_error"),
    "loading": (503, "service_unavailable_error"),
    "draining": (503, "service_unavailable_error"),
    "deadline_exceeded": (504, "timeout_error"),
    # The server is at fault.
    "worker_failed": (500, "server_error"),
    "engine_failed": (500, "server_error"),
    "internal_error": (500, "server_error"),
    # The client is at fault after the request began.
    "client_too_slow": (500, "server_error"),
    "aborted": (499, "invalid_request_error"),
    # Configuration: printed at start-up, never sent over HTTP.
    "invalid_config": (500, "server_error"),
    "model_invalid": (500, "server_error"),
    "protocol_error": (400, "invalid_request_error"),
}


def http_status(code: str) -> int:
    """The HTTP status of an error code; unknown codes are server errors."""
    return CODES.get(code, (500, "server_error"))[0]


def error_type(code: str) -> str:
    """The `type` of OpenAI's error object for an error code."""
    return CODES.get(code, (500, "server_error"))[1]
