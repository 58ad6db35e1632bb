"""ChatTemplate: a conversation to prompt text, by the checkpoint's Jinja template.

Templates are data from strangers: they run in Jinja's immutable sandbox, with limits of time, output and repetition.
Rendering must happen in the main thread, where a timer can interrupt it.
"""

from __future__ import annotations

import datetime
import json
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from core.errors import QuireError
from core.model_info import read_json

MAX_TEXT = 8 * 1024 * 1024
MAX_RENDER_S = 2.0
MAX_POWER = 64


class _TooLong(Exception):
    pass


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with repetition and powers bounded: `"x" * 10**9` is an error, not a gigabyte."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= MAX_TEXT and abs(right) <= MAX_POWER):
            raise jinja2.TemplateRuntimeError("a power is too large")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int) and len(one) * other > MAX_TEXT:
                    raise jinja2.TemplateRuntimeError("a repetition is too long")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """One checkpoint's template. `render` raises QuireError template_error with the template's own words."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols], autoescape=False
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise QuireError("model_invalid", f"the chat template cannot be compiled: {error}", "model") from None

    @staticmethod
    def load(folder: Path) -> ChatTemplate | None:
        """The template of a checkpoint, or None when it has none."""
        config = read_json(folder / "tokenizer_config.json", optional=True)
        source = config.get("chat_template")
        if isinstance(source, list):
            named = {item["name"]: item["template"] for item in source}
            source = named.get("default") or next(iter(named.values()), None)
        if (path := folder / "chat_template.jinja").is_file():
            source = path.read_text()
        if not isinstance(source, str):
            return None
        tokens = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = config.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                tokens[name] = value
        return ChatTemplate(source, tokens)

    def render(
        self,
        messages: list[Any],
        tools: list[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: dict[str, Any] | None = None,
    ) -> str:
        """The prompt text, ready to be encoded without adding special tokens.

        continue_final_message: the text ends with the last message's content, for the model to go on with.
        """
        values = {
            **self._special_tokens,
            **(extra or {}),
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        try:
            text = self._limited(values)
        except _TooLong as error:
            raise QuireError("template_error", f"the chat template was stopped: {error}", "messages") from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            text = f"the chat template does not accept these messages: {error}"
            raise QuireError("template_error", text, "messages") from None
        return _cut_after_final_message(text, messages) if continue_final_message else text

    def _limited(self, values: dict[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        old = signal.signal(signal.SIGALRM, _alarm)
        signal.setitimer(signal.ITIMER_REAL, MAX_RENDER_S)
        try:
            for piece in self._template.generate(values):
                size += len(piece)
                if size > MAX_TEXT:
                    raise _TooLong(f"it writes more than {MAX_TEXT:,} characters")
                pieces.append(piece)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        return "".join(pieces)


def _alarm(number: int, frame: FrameType | None) -> None:
    raise _TooLong(f"it takes more than {MAX_RENDER_S} s")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _cut_after_final_message(text: str, messages: list[Any]) -> str:
    content = messages[-1].get("content") if messages and isinstance(messages[-1], dict) else None
    if isinstance(content, list):
        content = next((part.get("text") for part in reversed(content) if isinstance(part, dict)), None)
    if not isinstance(content, str) or not content.strip() or (at := text.rfind(content.strip())) < 0:
        text = "continue_final_message: the last message has no text that the chat template shows"
        raise QuireError("template_error", text, "continue_final_message")
    return text[: at + len(content.strip())]
