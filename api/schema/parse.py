"""Parse: a JSON body into a valid struct, in one pass over the text, with errors that name the field."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from core.errors import QuireError

log = logging.getLogger("quire.api")

T = TypeVar("T", bound=msgspec.Struct)

MAX_DEPTH = 64  # of nested arrays and objects; a tool's JSON schema rarely needs 20
_CONTAINERS = {dict, list}
_warned: set[str] = set()
_MAX_WARNED = 1000  # field names are the client's: what is remembered of them is bounded

_AT = re.compile(r" - at (?:`key` in )?`\$\.?(.*?)`$")
_FIELD = re.compile(r"field `(.*?)`")


def parse(body: bytes, kind: type[T], *, strict_fields: bool) -> tuple[T, dict[str, Any]]:
    """The body as a `kind`, and as plain objects (for parts that are passed on as they came).

    Fields that `kind` does not have are ignored with one logged warning per name; `strict_fields` refuses them.
    Raises QuireError: invalid_json, invalid_type, missing_field, unknown_field.
    """
    try:
        raw = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError as error:
        text = f"the body is not valid UTF-8 (byte {error.start} of a string); send JSON in UTF-8"
        raise QuireError("invalid_json", text) from None
    except (msgspec.DecodeError, ValueError) as error:  # ValueError: an integer with thousands of digits
        raise QuireError("invalid_json", f"the body is not valid JSON: {error}") from None
    return convert(raw, kind, strict_fields=strict_fields)


def convert(raw: Any, kind: type[T], *, strict_fields: bool) -> tuple[T, dict[str, Any]]:
    """As `parse`, from objects that are decoded already."""
    if not isinstance(raw, dict):
        raise QuireError("invalid_type", "the body must be a JSON object")
    if _depth_exceeds(raw, MAX_DEPTH):
        raise _too_deep()
    _check_unknown(raw, kind, strict_fields)
    try:
        return msgspec.convert(raw, kind), raw
    except msgspec.ValidationError as error:
        raise explain(error) from None


def check_unsupported(raw: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse fields of the API that mean something not done here, unless their value asks for nothing.

    Args:
        neutral: field -> values that ask for nothing; null always does.
    """
    for field, values in neutral.items():
        value = raw.get(field)
        if value is not None and value not in values:
            allowed = " or ".join([msgspec.json.encode(item).decode() for item in values] or ["null"])
            raise QuireError("unsupported", f"{field} is not supported here; leave it out or send {allowed}", field)


def _check_unknown(raw: dict[str, Any], kind: type[msgspec.Struct], strict: bool) -> None:
    for field in raw.keys() - set(kind.__struct_encode_fields__):
        shown = field[:100]
        if strict:
            raise QuireError("unknown_field", f"{shown!r} is not a field of this request; remove it", shown)
        if shown not in _warned and len(_warned) < _MAX_WARNED:
            _warned.add(shown)
            log.warning("ignored: unknown request field %r (said once; --strict-fields refuses it)", shown)


def explain(error: msgspec.ValidationError) -> QuireError:
    """msgspec's error as ours: its path becomes `param`, e.g. messages[1].content."""
    text = str(error)
    at = _AT.search(text)
    path = at.group(1).replace("[...]", "") if at else ""  # a place in a map, which msgspec does not name
    what = text[: at.start()] if at else text
    code = "invalid_type"
    if what.startswith("Object missing required field"):
        code = "missing_field"
    elif what.startswith("Object contains unknown field"):
        code = "unknown_field"
    elif not what.startswith("Expected") or "of length" in what or "matching" in what:
        code = "invalid_value"
    field = _FIELD.search(what)
    if code in ("missing_field", "unknown_field") and field is not None:
        path = f"{path}.{field.group(1)}" if path else field.group(1)
        return QuireError(code, f"{path} is {'missing' if code == 'missing_field' else 'no field'}", path)
    sentence = what[:1].lower() + what[1:]
    return QuireError(code, f"{path}: {sentence}" if path else sentence, path or None)


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Whether containers nest deeper than `limit`; without recursion, level by level."""
    level = [value]
    for _ in range(limit + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [child for child in item.values() if isinstance(child, dict | list)]
            elif not _CONTAINERS.isdisjoint(map(type, item)):  # a long list of token ids is passed over quickly
                inner += [child for child in item if isinstance(child, dict | list)]
        if not inner:
            return False
        level = inner
    return True


def _too_deep() -> QuireError:
    return QuireError("invalid_json", f"the body nests deeper than {MAX_DEPTH} levels")
