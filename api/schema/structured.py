"""The fields by which a request says what its output must be, and the StructuredOutputs that they become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from api.schema.parse import check_unsupported
from core.errors import QuireError
from quire import StructuredOutputs

Schema = dict[str, Any] | bool


class JsonSchema(msgspec.Struct):
    """OpenAI's. `strict` changes nothing: the output always follows the schema."""

    name: str | None = None
    description: str | None = None
    schema: Schema | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputsBody(msgspec.Struct, forbid_unknown_fields=True):
    """As vLLM names them; `json` also as a text. Ignoring a field could mean another output, so none is ignored."""

    json: Schema | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    disable_fallback: Any = None
    disable_any_whitespace: Any = None
    disable_additional_properties: Any = None
    whitespace_pattern: Any = None
    structural_tag: Any = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "disable_fallback": (True, False),  # there is nothing to fall back on
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
    "structural_tag": (),
}


class StructuredFields(msgspec.Struct, kw_only=True):
    """At most one of them asks for something; guided_* are vLLM's older names."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsBody | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


def structured_outputs(fields: StructuredFields, raw: Mapping[str, Any]) -> StructuredOutputs | None:
    """What the output must be, or None. `raw`: the same fields as they came. Raises QuireError."""
    found: list[StructuredOutputs] = []
    if fields.response_format is not None:
        found += _response_format(fields.response_format)
    if (body := fields.structured_outputs) is not None:
        check_unsupported(raw["structured_outputs"], _NEUTRAL)
        choice = None if body.choice is None else tuple(body.choice)
        whole = bool(body.json_object)
        found.append(
            StructuredOutputs(json=body.json, json_object=whole, regex=body.regex, choice=choice, grammar=body.grammar)
        )
    if fields.guided_json is not None:
        found.append(StructuredOutputs(json=fields.guided_json, source="guided_json"))
    if fields.guided_regex is not None:
        found.append(StructuredOutputs(regex=fields.guided_regex, source="guided_regex"))
    if fields.guided_choice is not None:
        found.append(StructuredOutputs(choice=tuple(fields.guided_choice), source="guided_choice"))
    if fields.guided_grammar is not None:
        found.append(StructuredOutputs(grammar=fields.guided_grammar, source="guided_grammar"))
    if len(found) > 1:
        first, second = found[0].source, found[1].source
        raise QuireError("invalid_value", f"{first} and {second} exclude each other; send one of them", second)
    return found[0] if found else None


def _response_format(wanted: ResponseFormat) -> list[StructuredOutputs]:
    """Nothing for text, else one."""
    match wanted.type:
        case "text":
            return []
        case "json_object":
            return [StructuredOutputs(json_object=True, source="response_format")]
        case "json_schema":
            if wanted.json_schema is None or wanted.json_schema.schema is None:
                at = "response_format.json_schema" + ("" if wanted.json_schema is None else ".schema")
                raise QuireError("missing_field", f"{at} is missing", at)
            return [StructuredOutputs(json=wanted.json_schema.schema, source="response_format")]
    text = f"response_format.type: {wanted.type[:40]!r} is none of text, json_object, json_schema"
    raise QuireError("unsupported", text, "response_format.type")
