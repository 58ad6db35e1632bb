"""ChatTemplate: a conversation to prompt text, by the checkpoint's Jinja template.

Templates are data from strangers: they run in a sandbox (template_sandbox.py), with limits of time and of output.
Rendering must happen in the main thread, where a timer can interrupt it.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2

from core.errors import QuireError
from core.model_info import read_json
from core.template_sandbox import MAX_TEXT, TemplateSandbox

MAX_RENDER_S = 2.0
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Follows the final message through the template, to find where its text ends; the space shows whether it was trimmed.
_MARK = "\ue000QUIRE-FINAL\ue000 "


class _TooLong(Exception):
    pass


class ChatTemplate:
    """One checkpoint's template. `render` raises QuireError template_error with the template's own words.

    tool_source: the template that takes over when the request has tools, where the checkpoint has one.
    """

    def __init__(self, source: str, special_tokens: dict[str, Any], tool_source: str | None = None) -> None:
        self._special_tokens = special_tokens
        environment = TemplateSandbox()
        try:
            self._plain = environment.from_string(source)
            self._with_tools = self._plain if tool_source is None else environment.from_string(tool_source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise QuireError("model_invalid", f"the chat template cannot be compiled: {error}", "model") from None

    @staticmethod
    def load(folder: Path) -> ChatTemplate | None:
        """The template of a checkpoint, or None when it has none. Files win over tokenizer_config.json."""
        config = read_json(folder / "tokenizer_config.json", optional=True)
        sources = _sources(config.get("chat_template"), folder)
        for path in (folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))):
            if path.is_file():
                name = "default" if path.parent == folder else path.stem
                try:
                    sources[name] = path.read_text("utf-8")
                except (OSError, UnicodeDecodeError) as error:
                    raise QuireError("model_invalid", f"cannot read {path}: {error}", "model") from None
        if not sources:
            return None
        tools = sources.get("tool_use")
        source = sources.get("default") or tools or next(iter(sources.values()))
        known = read_json(folder / "special_tokens_map.json", optional=True) | config
        tokens = {name: text for name in SPECIAL_TOKENS if (text := _content(known.get(name))) is not None}
        return ChatTemplate(source, tokens, tools)

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
            "messages": _marked(messages) if continue_final_message else messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        try:
            text = self._limited(self._with_tools if tools else self._plain, values)
        except _TooLong as error:
            raise QuireError("template_error", f"the chat template was stopped: {error}", "messages") from None
        except Exception as error:  # a template can raise whatever Python can: division by zero, recursion, …
            text = f"the chat template does not accept these messages: {error}"
            raise QuireError("template_error", text, "messages") from None
        return _cut_at_mark(text) if continue_final_message else text

    def _limited(self, template: jinja2.Template, values: dict[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        old = signal.signal(signal.SIGALRM, _alarm)
        signal.setitimer(signal.ITIMER_REAL, MAX_RENDER_S)
        try:
            for piece in template.generate(values):
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


def _sources(given: Any, folder: Path) -> dict[str, str]:
    """Templates by name, from tokenizer_config.json: one text, or a list of named ones."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list) and all(
        isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
        for item in given
    ):
        return {item["name"]: item["template"] for item in given}
    text = f"{folder}/tokenizer_config.json: chat_template must be a text or a list of named texts"
    raise QuireError("model_invalid", text, "model")


def _content(token: Any) -> str | None:
    """A special token's text; both spellings, plain and as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _marked(messages: list[Any]) -> list[Any]:
    """The messages, with the mark behind the last one's text. Raises QuireError when it has none."""
    last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
    content = last.get("content")
    if isinstance(content, str):
        return [*messages[:-1], {**last, "content": content + _MARK}]
    if isinstance(content, list):
        for i in reversed(range(len(content))):
            if isinstance(content[i], dict) and isinstance(content[i].get("text"), str):
                part = {**content[i], "text": content[i]["text"] + _MARK}
                return [*messages[:-1], {**last, "content": [*content[:i], part, *content[i + 1 :]]}]
    raise _nothing_to_continue()


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_MARK.strip())
    if at < 0:
        raise _nothing_to_continue()
    # A template that trims messages has trimmed behind the mark: then spaces before it would have gone too.
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def _nothing_to_continue() -> QuireError:
    text = "continue_final_message: the last message has no text that the chat template shows"
    return QuireError("template_error", text, "continue_final_message")
