"""Deadline: how long a client lets a request take, from the body's fields or from a header; the shortest one counts."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from core.errors import QuireError

HEADER = "x-request-timeout-s"
MAX_TIMEOUT_S = 86_400.0


def deadline_s(timeout_s: float | None, field: str = "timeout_s") -> float | None:
    """The monotonic time at which a request that may take `timeout_s` ends; None: it may take any time.

    Raises QuireError("invalid_value") naming `field`.
    """
    if timeout_s is None:
        return None
    if not 0 < timeout_s <= MAX_TIMEOUT_S:  # NaN is refused too
        text = f"{field}: {timeout_s!r} must be above 0 and at most {MAX_TIMEOUT_S:.0f} seconds"
        raise QuireError("invalid_value", text, field)
    return time.monotonic() + timeout_s


def header_deadline_s(headers: Mapping[str, str]) -> float | None:
    """The deadline that the header sets. Raises QuireError("invalid_value")."""
    text = headers.get(HEADER)
    if text is None:
        return None
    try:
        timeout_s = float(text)
    except ValueError:
        raise QuireError("invalid_value", f"{HEADER}: {text[:40]!r} is no number of seconds", HEADER) from None
    return deadline_s(timeout_s, HEADER)


def earliest(*deadlines: float | None) -> float | None:
    """The first of several deadlines."""
    found = min((deadline for deadline in deadlines if deadline is not None), default=math.inf)
    return None if found == math.inf else found
