"""Structured output from a real server: whatever is drawn follows the schema, the regex, the choice or the grammar."""

from __future__ import annotations

import json
import random
import re
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import openai
import pydantic
import pytest

import quire
from tests.e2e.serving import Server

ASK = [{"role": "user", "content": "Who is the king of Hungary?"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["glad", "sad", None]},
        "friends": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
    },
    "required": ["name", "age", "mood", "friends"],
    "additionalProperties": False,
}
COSTLY = "(((a{1,100}){1,100}){1,100}){1,100}"  # compiles, and is more than the library may do after some tokens


class Person(pydantic.BaseModel):
    name: str
    age: int
    mood: str


@pytest.fixture
def client(server: Server) -> Any:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def ask(client: Any, max_tokens: int = 200, **fields: Any) -> Any:
    """A chat; what openai's client does not know goes into its extra_body."""
    extra = {key: fields.pop(key) for key in list(fields) if key.startswith(("guided_", "structured", "min_tokens"))}
    return client.chat.completions.create(
        model="tiny-chat", messages=ASK, max_tokens=max_tokens, extra_body=extra, **fields
    )


def content(answer: Any) -> str:
    """The one choice's text; it must have come to its end."""
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    text: str = choice.message.content
    return text


def check(value: Any, schema: dict[str, Any]) -> None:
    """As much of JSON Schema as the tests here use."""
    if "enum" in schema:
        assert value in schema["enum"]
        return
    kind = schema["type"]
    types: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    assert isinstance(value, types.get(kind, int | float)), (value, schema)
    assert kind == "boolean" or not isinstance(value, bool)
    assert kind != "integer" or isinstance(value, int)
    if kind in ("integer", "number"):
        assert schema.get("minimum", value) <= value <= schema.get("maximum", value)
    if kind == "string":
        assert schema.get("minLength", 0) <= len(value) <= schema["maxLength"]
        assert re.search(schema.get("pattern", ""), value)
    if kind == "array":
        assert schema.get("minItems", 0) <= len(value) <= schema["maxItems"]
        for item in value:
            check(item, schema["items"])
    if kind == "object":
        assert set(schema["required"]) <= set(value) <= set(schema["properties"])
        for name, item in value.items():
            check(item, schema["properties"][name])


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["boolean", "null", "integer", "number", "string", "enum", "pattern"]
    kind = rng.choice(kinds + (["object", "array"] * 3 if depth < 2 else []))
    match kind:
        case "enum":
            return {"enum": rng.sample(["a", 'quo"te', "é😀", 7, -1.5, True, None, ""], rng.randint(1, 4))}
        case "pattern":
            return {"type": "string", "pattern": "^[a-c]{2,4}$", "maxLength": 4}
        case "string":
            return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 9)}
        case "integer" | "number":
            return {"type": kind, "minimum": rng.randint(-50, 0), "maximum": rng.randint(1, 999)}
        case "array":
            items = random_schema(rng, depth + 1)
            return {"type": "array", "items": items, "minItems": rng.randint(0, 1), "maxItems": rng.randint(1, 3)}
        case "object":
            properties = {f"p{i}": random_schema(rng, depth + 1) for i in range(rng.randint(1, 3))}
            required = rng.sample(list(properties), rng.randint(0, len(properties)))
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def test_json_schema_over_many_seeds(client: Any) -> None:
    def one(seed: int) -> str:
        return content(ask(client, response_format=schema_format(PERSON), seed=seed, temperature=1.0))

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(one, range(40)))
    for text in texts:
        check(json.loads(text), PERSON)
    assert len(set(texts)) > 20


@pytest.mark.parametrize("seed", range(3))
def test_random_schemas(client: Any, seed: int) -> None:
    rng = random.Random(seed)
    schemas = [random_schema(rng) for _ in range(12)]

    def one(schema: dict[str, Any]) -> Any:
        return ask(client, 700, response_format=schema_format(schema), seed=seed, temperature=1.5)

    with ThreadPoolExecutor(6) as pool:
        for schema, answer in zip(schemas, pool.map(one, schemas), strict=True):
            if answer.choices[0].finish_reason == "stop":
                check(json.loads(answer.choices[0].message.content), schema)
            else:  # long digits of a number; what is there must be a beginning
                assert answer.choices[0].finish_reason == "length"
                assert "number" in json.dumps(schema)


def test_the_four_kinds_under_all_names(client: Any) -> None:
    fields: dict[str, Any]
    for fields in ({"structured_outputs": {"json": PERSON}}, {"guided_json": json.dumps(PERSON)}):
        check(json.loads(content(ask(client, **fields))), PERSON)
    for fields in ({"structured_outputs": {"regex": "[0-9]{3}-[a-f]+;"}}, {"guided_regex": "[0-9]{3}-[a-f]+;"}):
        assert re.fullmatch("[0-9]{3}-[a-f]+;", content(ask(client, **fields, temperature=0.3)))
    words = ["Béla IV", "Matthias 😀", 'the "last" one']
    for fields in ({"structured_outputs": {"choice": words}}, {"guided_choice": words}):
        assert {content(ask(client, **fields, seed=seed, temperature=9.0)) for seed in range(12)} <= set(words)
    lark = 'start: sum " =" \nsum: NUMBER | sum "+" NUMBER\nNUMBER: /[1-9]/'
    gbnf = 'root ::= sum " ="\nsum ::= [1-9] ("+" [1-9])*'
    for grammar in ({"structured_outputs": {"grammar": lark}}, {"guided_grammar": gbnf}):
        assert re.fullmatch(r"[1-9](\+[1-9])* =", content(ask(client, **grammar, temperature=1.0, seed=5)))
    answer = json.loads(content(ask(client, response_format={"type": "json_object"}, temperature=0)))
    assert isinstance(answer, dict)
    free = ask(client, response_format={"type": "text"}, temperature=0)
    assert free.choices[0].message.content == ask(client, temperature=0).choices[0].message.content


def test_completions(client: Any) -> None:
    answer = client.completions.create(
        model="tiny-chat", prompt=["One", "Two"], max_tokens=60, n=2, seed=1, logprobs=1, echo=True,
        extra_body={"response_format": schema_format(PERSON["properties"]["friends"])},
    )  # fmt: skip
    for choice in answer.choices:
        assert choice.text[:3] in ("One", "Two")
        check(json.loads(choice.text[3:]), PERSON["properties"]["friends"])


def test_stream_and_n_and_logprobs(client: Any) -> None:
    fields: dict[str, Any] = {"response_format": schema_format(PERSON), "seed": 4, "n": 2, "temperature": 1.0}
    whole = ask(client, **fields)
    texts = [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    for text in texts:
        check(json.loads(text), PERSON)
    streamed = ["", ""]
    for chunk in ask(client, **fields, stream=True, logprobs=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_cuts(client: Any) -> None:
    short = ask(client, 5, response_format=schema_format(PERSON), temperature=0)
    assert short.choices[0].finish_reason == "length"
    stopped = ask(client, response_format=schema_format(PERSON), temperature=0, stop=['"age"'])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content.rstrip().endswith(",")
    answer = ask(client, structured_outputs={"choice": ["yes"]}, temperature=0)
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("stop", "yes")


def test_openai_parse_with_pydantic(client: Any) -> None:
    for seed in range(5):
        answer = client.chat.completions.parse(
            model="tiny-chat", messages=ASK, response_format=Person, seed=seed, max_tokens=400, temperature=0.8
        )
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(answer.choices[0].message.parsed, Person)
            return
    pytest.fail("no answer came to its end")


def test_zmq_client_and_null_device() -> None:
    with quire.LLM(device="null") as llm:
        wanted = quire.StructuredOutputs(regex="(ab){2,3}")
        (result,) = llm.generate(["x"], quire.SamplingParams(structured_outputs=wanted, max_tokens=20))
        assert re.fullmatch(wanted.regex or "", result.text)
        with pytest.raises(quire.QuireError) as error:
            llm.generate(["x"], quire.SamplingParams(structured_outputs=quire.StructuredOutputs(json={"type": 3})))
        assert error.value.code == "invalid_grammar"


BAD: list[tuple[dict[str, Any], str, str | None]] = [
    ({"response_format": schema_format({"type": "nonsense"})}, "invalid_grammar", "response_format"),
    ({"response_format": schema_format({"multipleOf": 99999989, "type": "integer"})}, "invalid_grammar",
     "response_format"),
    ({"guided_regex": "("}, "invalid_grammar", "guided_regex"),
    ({"guided_choice": []}, "invalid_grammar", "guided_choice"),
    ({"guided_json": "{"}, "invalid_grammar", "guided_json"),
    ({"guided_grammar": "start: nothing"}, "invalid_grammar", "guided_grammar"),
    ({"guided_grammar": 'start: %json {"type": "object"}'}, "invalid_grammar", "guided_grammar"),
    ({"structured_outputs": {}}, "invalid_grammar", "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "invalid_grammar", "structured_outputs"),
    ({"structured_outputs": {"regex": COSTLY}, "min_tokens": 150}, "invalid_grammar", None),  # after it has begun
    ({"structured_outputs": {"regex": "a"}, "guided_json": {}}, "invalid_value", "guided_json"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "unsupported", "whitespace_pattern"),
    ({"structured_outputs": {"regexp": "a"}}, "unknown_field", "structured_outputs.regexp"),
    ({"structured_outputs": {"regex": 3}}, "invalid_type", "structured_outputs.regex"),
    ({"response_format": {"type": "json_schema"}}, "missing_field", "response_format.json_schema"),
    ({"response_format": {"type": "structural_tag"}}, "unsupported", "response_format.type"),
]  # fmt: skip


def test_a_bad_grammar_fails_alone(client: Any) -> None:
    """Every one is a 400 that names the field, and a stream beside them is what it is without them."""

    def witness() -> str:
        answer = client.completions.create(model="tiny-chat", prompt="Once", max_tokens=300, seed=3, stream=True,
                                           extra_body={"ignore_eos": True})  # fmt: skip
        return "".join(chunk.choices[0].text for chunk in answer)

    alone = witness()
    beside: list[str] = []
    thread = threading.Thread(target=lambda: beside.append(witness()))
    thread.start()
    for fields, code, param in BAD:
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, **fields)
        assert (error.value.code, error.value.param) == (code, param), fields
    thread.join(60)
    assert beside == [alone]


def test_preemption_changes_nothing(serve: Callable[..., AbstractContextManager[Server]]) -> None:
    friends = {"type": "array", "items": PERSON["properties"]["name"], "minItems": 25, "maxItems": 30}

    def answers(server: Server) -> list[str]:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=60) as client:

            def one(seed: int) -> str:
                answer = ask(client, 180, response_format=schema_format(friends), seed=seed, temperature=1.0)
                text: str = answer.choices[0].message.content
                return text

            with ThreadPoolExecutor(8) as pool:
                return list(pool.map(one, range(8)))

    def preemptions(server: Server) -> int:
        time.sleep(1.5)  # statistics come with the heartbeat
        with urllib.request.urlopen(server.url + "/stats", timeout=10) as answer:
            return int(json.load(answer)["engine"]["preemptions"])

    with serve("--dtype", "float32") as calm:
        undisturbed = answers(calm)
        assert preemptions(calm) == 0
    with serve("--dtype", "float32", "--num-kv-blocks", "20", "--block-size", "16", "--max-model-len", "300") as narrow:
        assert answers(narrow) == undisturbed
        assert preemptions(narrow) > 0
