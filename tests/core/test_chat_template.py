"""Chat templates: the same text as transformers, and limits that hold."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from core.chat_template import ChatTemplate
from core.errors import QuireError
from core.model_info import BUILTIN

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "é", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Pécs"}}}
CONVERSATIONS: list[tuple[list[dict[str, Any]], list[Any] | None]] = [
    ([{"role": "user", "content": "Hello"}], None),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\nthere"}], None),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}], None),
    ([{"role": "user", "content": [{"type": "text", "text": "part"}, {"type": "text", "text": "s"}]}], None),
    ([{"role": "user", "content": "x"}], [TOOL]),
    (
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": "12 °C"},
        ],
        [TOOL, TOOL],
    ),
    ([{"role": "assistant", "content": "y", "reasoning_content": "because"}], None),
]


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    loaded = ChatTemplate.load(BUILTIN["tiny-chat"])
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoTokenizer.from_pretrained(str(BUILTIN["tiny-chat"]))


@pytest.mark.parametrize("index", range(len(CONVERSATIONS)))
@pytest.mark.parametrize("generation", [True, False])
def test_equals_transformers(template: ChatTemplate, reference: Any, index: int, generation: bool) -> None:
    messages, tools = CONVERSATIONS[index]
    want = reference.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generation)
    assert template.render(messages, tools, generation) == want
    more = reference.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert template.render(messages, tools, True, extra={"enable_thinking": True}) == more


def test_continue_final_message(template: ChatTemplate) -> None:
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one, two"}]
    assert template.render(messages, continue_final_message=True).endswith("<|im_start|>assistant\none, two")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 2"),
        ("{{ 'x' * 99999999999 }}", "repetition"),
        ("{{ [0] * 99999999999 }}", "repetition"),
        ("{{ 9 ** 99999 }}", "power"),
        ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "characters"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].content.nothing.more }}", "no attribute"),
    ],
)
def test_limits(source: str, words: str) -> None:
    with pytest.raises(QuireError, match=words) as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    assert caught.value.code == "template_error"


def test_a_broken_template_is_refused_at_start() -> None:
    with pytest.raises(QuireError, match="cannot be compiled"):
        ChatTemplate("{% if %}", {})
