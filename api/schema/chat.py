"""POST /v1/chat/completions: the request, and the answer's objects."""

from __future__ import annotations

from typing import Any

import msgspec

from api.schema.parse import check_unsupported, explain, parse
from api.schema.sampling import (
    NEUTRAL,
    GenerationFields,
    check_common,
    fields_deadline_s,
    sampling_params,
    user_of,
)
from api.schema.usage import Usage
from api.served import ServedModel
from core.errors import QuireError
from core.messages import ChatPrompt
from quire import SamplingParams

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct):
    function: FunctionCall
    id: str | None = None
    type: str | None = None


class Message(msgspec.Struct):
    """One turn. Further keys (reasoning_content, …) reach the template as they are."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct):
    type: str
    function: Function


class ChatBody(GenerationFields, kw_only=True):
    """The JSON fields."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    verbosity: Any = None
    echo: bool | None = None
    best_of: int | None = None
    chat_template: Any = None
    documents: Any = None
    use_beam_search: bool | None = None


_NEUTRAL = {
    **NEUTRAL,
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "echo": (False,),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "use_beam_search": (False,),
}


class ChatRequest(msgspec.Struct, frozen=True):
    """A valid request: what to generate from, how, and how to write the answer."""

    prompt: ChatPrompt
    sampling: SamplingParams
    stream: bool
    include_usage: bool
    return_token_ids: bool
    priority: int
    cache_salt: str
    deadline_s: float | None
    user: str


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, omit_defaults=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(msgspec.Struct, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None


def chat_request(body: bytes, model: ServedModel, *, strict_fields: bool) -> ChatRequest:
    """Parse and check a body. Raises QuireError."""
    fields, raw = parse(body, ChatBody, strict_fields=strict_fields)
    model.check_name(fields.model)
    check_common(fields)
    check_unsupported(raw, _NEUTRAL)
    return ChatRequest(
        prompt=_prompt(fields, raw),
        sampling=_sampling(fields, raw, model),
        stream=bool(fields.stream),
        include_usage=fields.stream_options is not None and bool(fields.stream_options.include_usage),
        return_token_ids=bool(fields.return_token_ids),
        priority=fields.priority or 0,
        cache_salt=fields.cache_salt or "",
        deadline_s=fields_deadline_s(fields),
        user=user_of(fields),
    )


def chat_prompt(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> ChatPrompt:
    """The prompt of a chat that comes through another door. Raises QuireError."""
    raw: dict[str, Any] = {"messages": messages, "tools": tools, "chat_template_kwargs": template_kwargs}
    try:
        fields = msgspec.convert(raw, ChatBody)
    except msgspec.ValidationError as error:
        raise explain(error) from None
    return _prompt(fields, raw)


def _sampling(fields: ChatBody, raw: dict[str, Any], model: ServedModel) -> SamplingParams:
    if fields.top_logprobs is not None and not fields.logprobs:
        raise QuireError("invalid_value", "top_logprobs needs logprobs: true", "top_logprobs")
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    max_tokens = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    try:
        return sampling_params(fields, raw, model, max_tokens=max_tokens, logprobs=logprobs)
    except QuireError as error:
        if error.param == "logprobs":
            raise QuireError(error.code, f"top_{error.message}", "top_logprobs") from None
        if error.param == "max_tokens" and fields.max_completion_tokens is not None:
            text = error.message.replace("max_tokens", "max_completion_tokens", 1)
            raise QuireError(error.code, text, "max_completion_tokens") from None
        raise


def _prompt(fields: ChatBody, raw: dict[str, Any]) -> ChatPrompt:
    if not fields.messages:
        raise QuireError("invalid_value", "messages is empty; send at least one", "messages")
    continues = bool(fields.continue_final_message)
    generates = not continues if fields.add_generation_prompt is None else fields.add_generation_prompt
    if continues and generates:
        text = "continue_final_message goes with add_generation_prompt: false"
        raise QuireError("invalid_value", text, "continue_final_message")
    if continues and fields.messages[-1].role != "assistant":
        text = "continue_final_message needs an assistant message at the end"
        raise QuireError("invalid_value", text, "continue_final_message")
    kwargs = dict(fields.chat_template_kwargs or {})
    if fields.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", fields.reasoning_effort)
    turns = [_turn(index, turn, raw["messages"][index]) for index, turn in enumerate(fields.messages)]
    tools = _tools(fields, raw)
    return ChatPrompt(
        messages=msgspec.json.encode(turns),
        tools=None if tools is None else msgspec.json.encode(tools),
        add_generation_prompt=generates,
        continue_final_message=continues,
        template_kwargs=msgspec.json.encode(kwargs) if kwargs else None,
    )


def _turn(index: int, turn: Message, raw: dict[str, Any]) -> dict[str, Any]:
    """A message as templates want it: content as one string, a call's arguments as an object."""
    at = f"messages[{index}]"
    if turn.role not in ROLES:
        text = f"{at}.role: {turn.role[:40]!r} is none of {', '.join(ROLES)}"
        raise QuireError("invalid_value", text, f"{at}.role")
    if turn.content is None and not (turn.role == "assistant" and (turn.tool_calls or raw.get("reasoning_content"))):
        raise QuireError("missing_field", f"{at}.content is missing", f"{at}.content")
    result = dict(raw)
    if turn.role == "developer":
        result["role"] = "system"  # what OpenAI calls it now; templates know the older name
    if isinstance(turn.content, list):
        result["content"] = "".join(_part(f"{at}.content[{place}]", part) for place, part in enumerate(turn.content))
    if turn.tool_calls:
        result["tool_calls"] = [_call(call) for call in raw["tool_calls"]]
    elif "tool_calls" in result:
        del result["tool_calls"]
    return result


def _part(at: str, part: ContentPart) -> str:
    if part.type not in ("text", "input_text"):
        text = f"{at}.type: {part.type[:40]!r} is not supported; this model reads text"
        raise QuireError("unsupported", text, f"{at}.type")
    if part.text is None:
        raise QuireError("missing_field", f"{at}.text is missing", f"{at}.text")
    return part.text


def _call(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"].get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = msgspec.json.decode(arguments or "{}")
    except (msgspec.DecodeError, RecursionError, ValueError):
        return call  # a model's own words, handed back: not the client's fault, and templates take text too
    return {**call, "function": {**call["function"], "arguments": parsed}} if isinstance(parsed, dict) else call


def _tools(fields: ChatBody, raw: dict[str, Any]) -> list[dict[str, Any]] | None:
    if not fields.tools or fields.tool_choice == "none":
        return None
    for index, tool in enumerate(fields.tools):
        if tool.type != "function":
            text = f"tools[{index}].type: {tool.type[:40]!r} is not supported; it must be 'function'"
            raise QuireError("unsupported", text, f"tools[{index}].type")
    tools: list[dict[str, Any]] = raw["tools"]
    return tools
