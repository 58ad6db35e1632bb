"""Chat templates: the same text as transformers, and limits that hold."""

from __future__ import annotations

import json
from pathlib import Path
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
        # One operation that builds something huge cannot be interrupted: it must be refused.
        ("{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "too long"),
        ("{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}", "too long"),
        ("{% set n = namespace(x=9) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}", "number"),
        ("{{ 'x'|center(999999999) }}", "too long"),
        ("{{ 'x'.ljust(999999999) }}", "too long"),
        ("{{ 'x\n'|indent(999999999, true) }}", "too long"),
        ("{{ ('x' * 9999).replace('x', 'y' * 9999) }}", "too long"),
        ("{{ ('x' * 9999)|replace('x', 'y' * 9999) }}", "too long"),
        ("{{ ('x' * 9999).join(['a'] * 9999) }}", "too long"),
        ("{{ (['a'] * 9999)|join('x' * 9999) }}", "too long"),
        ("{{ ('\t' * 9999).expandtabs(9999) }}", "too long"),
        ("{{ '%999999999d' % 1 }}", "too wide"),
        ("{{ '%999999999d'|format(1) }}", "too wide"),
        ("{{ '{:>999999999}'.format(1) }}", "too wide"),
        ("{{ '{:>{w}}'.format(1, w=999999999) }}", "too wide"),
        # What a template can raise, it may not raise at us.
        ("{{ 1 // (messages|length - 1) }}", "by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ (messages[9:]|first).x.y }}", "No first item"),
    ],
)
def test_limits(source: str, words: str) -> None:
    with pytest.raises(QuireError, match=words) as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    assert caught.value.code == "template_error"


def test_what_templates_do_every_day_is_not_refused() -> None:
    source = (
        "{{ 'a' ~ 1 ~ none }}|{{ '%5.2f' % 3 }}|{{ '{:>3}'.format(7) }}|{{ ['a', 2]|join(', ') }}"
        "|{{ 'x-y'.split('-') }}"
        "|{{ 'a\nb'|indent(2) }}|{{ 'aXa'.replace('X', '-') }}|{{ 3 * 'ab' }}|{{ 2 ** 10 }}|{{ 'q'|center(3) }}"
        "|{{ [1] + [2] }}|{{ {'k': 'é<'}|tojson }}|{{ {'k': 1}|tojson(indent=1) }}"
        "|{{ messages|map(attribute='role')|join }}"
        "|{% generation %}{{ messages[0].content }}{% break_ %}{% endgeneration %}"
    ).replace("{% break_ %}", "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "x"}]) == (
        'a1None| 3.00|  7|a, 2|[\'x\', \'y\']|a\n  b|a-a|ababab|1024| q |[1, 2]|{"k": "é<"}|{\n "k": 1\n}|user|x01'
    )


def test_files_and_named_templates(tmp_path: Path) -> None:
    user = [{"role": "user", "content": "x"}]
    assert ChatTemplate.load(tmp_path) is None
    named = [{"name": "tool_use", "template": "T{{ eos_token }}"}, {"name": "default", "template": "D{{ bos_token }}"}]
    config = {"chat_template": named, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None
    assert loaded.render(user) == "D<s>"
    assert loaded.render(user, [TOOL]) == "T</s>"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None
    assert loaded.render(user) == "file x"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": 3}]}')
    with pytest.raises(QuireError, match="list of named texts"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("trim", ["", " | trim"])
@pytest.mark.parametrize("content", ["one, two", "one, two ", "  one\n", [{"type": "text", "text": "part "}]])
def test_continuing_equals_transformers(reference: Any, content: Any, trim: str) -> None:
    text = "message['content'] if message['content'] is string else message['content'][0].text"
    source = f"{{% for message in messages %}}[{{{{ message['role'] }}}}]{{{{ ({text}){trim} }}}}<end>\n{{% endfor %}}"
    messages = [{"role": "user", "content": "two"}, {"role": "assistant", "content": content}]
    want = reference.apply_chat_template(messages, chat_template=source, tokenize=False, continue_final_message=True)
    assert ChatTemplate(source, {}).render(messages, continue_final_message=True) == want
    with pytest.raises(QuireError, match="no text") as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": None}], continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_a_broken_template_is_refused_at_start() -> None:
    with pytest.raises(QuireError, match="cannot be compiled"):
        ChatTemplate("{% if %}", {})
