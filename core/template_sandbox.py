"""TemplateSandbox: the Jinja environment in which a checkpoint's template runs, with single operations bounded.

A timer interrupts a template between two of Python's instructions, not inside one: an operation that builds a long
string or number in one go (`"x" * 10**9`, `~`, `|center(10**9)`) has to be refused before it begins.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_TEXT = 8 * 1024 * 1024  # characters of a string, items of a list
MAX_BITS = 4096  # of a number
MAX_WIDTH_DIGITS = 4  # of a width or precision in a format
_WIDE_PERCENT = re.compile(rf"%[^%a-zA-Z]*(\d{{{MAX_WIDTH_DIGITS + 1},}}|\*)")
# A nested field ({:{width}}) could hold any width.
_WIDE_BRACES = re.compile(rf"\{{[^{{}}]*(\d{{{MAX_WIDTH_DIGITS + 1},}}|\{{)")


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks what an assistant wrote, for training; here its body is plain template."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it per instance)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with the functions that chat templates expect."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])
    code_generator_class = _CodeGenerator

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
        self.filters.update(tojson=_to_json, center=_center, indent=_indent, replace=_replace, format=_format)
        self.filters["join"] = _join
        self.globals.update(raise_exception=_raise, strftime_now=_strftime_now)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        match operator:
            case "*":
                _check_product(left, right)
            case "**":
                if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_BITS:
                    raise jinja2.TemplateRuntimeError("a power is too large")
            case "%":
                _check_format(left, _WIDE_PERCENT)
            case _:
                if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                    _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def concatenated(self, parts: tuple[Any, ...]) -> str:
        """What `~` does."""
        texts = [part if isinstance(part, str) else str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if getattr(value, "__name__", "") in ("format", "format_map"):
            _check_format(getattr(value, "__self__", None), _WIDE_BRACES)
        return super().wrap_str_format(value)

    def call(self, context: jinja2.runtime.Context, called: Any, /, *arguments: Any, **named: Any) -> Any:
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str):
            arguments = _checked_method(owner, getattr(called, "__name__", ""), arguments, named)
        return super().call(context, called, *arguments, **named)


def _check_size(size: int) -> None:
    if size > MAX_TEXT:
        raise jinja2.TemplateRuntimeError(f"a text or list of more than {MAX_TEXT:,} is too long")


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_BITS:
            raise jinja2.TemplateRuntimeError("a number is too large")
        return
    for one, count in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple) and isinstance(count, int) and len(one) * count > MAX_TEXT:
            raise jinja2.TemplateRuntimeError("a repetition is too long")


def _check_format(form: Any, wide: re.Pattern[str]) -> None:
    if isinstance(form, str) and wide.search(form):
        raise jinja2.TemplateRuntimeError("a format is too wide")


def _check_replaced(text: str, old: str, new: str) -> None:
    _check_size(len(text) + text.count(old) * len(new))


def _checked_method(owner: str, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a string's method, after the check that its result is of bounded size."""
    match name:
        case "replace" if len(arguments) >= 2:
            _check_replaced(owner, arguments[0], arguments[1])
        case "join" if arguments:
            parts = list(arguments[0])
            _check_size(sum(map(len, parts)) + len(owner) * len(parts))
            return (parts,)
        case "expandtabs":
            width = arguments[0] if arguments else named.get("tabsize", 8)
            _check_size(owner.count("\t") * max(0, width) + len(owner))
        case "center" | "ljust" | "rjust" | "zfill" if arguments:
            _check_size(arguments[0])
        case "translate":
            raise jinja2.TemplateRuntimeError("translate is not available")
    return arguments


def _center(value: Any, width: int = 80) -> str:
    _check_size(width)
    return str(value).center(width)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(value)
    each = len(width) if isinstance(width, str) else width
    _check_size(len(text) + (text.count("\n") + 2) * max(0, each))
    return jinja2.filters.do_indent(text, width, first, blank)


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(value), str(old), str(new)
    _check_replaced(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _format(value: Any, *arguments: Any, **named: Any) -> str:
    _check_format(str(value), _WIDE_PERCENT)
    return jinja2.filters.do_format(value, *arguments, **named)


@jinja2.pass_environment
def _join(environment: jinja2.Environment, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    parts = [str(part) for part in value]
    between = str(d)
    _check_size(sum(map(len, parts)) + len(between) * len(parts))
    return between.join(parts)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int):
        _check_size(indent * 1024)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
