"""The HTTP door over a real port: exact shapes, exact bytes, errors, and clients that go away."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest

from api.keys import Keys
from core.messages import ChatPrompt, StatsReply, TokensPrompt
from core.stats import EngineSnapshot
from quire import SamplingParams
from tests.api.serving import TEXT, WORDS, Doors, FakeTokenizer, doors

USER = [{"role": "user", "content": "hi"}]


def post(url: str, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=10, **options)


def events(answer: httpx.Response) -> list[Any]:
    """The JSON of a stream's chunks; asserts that it ends with [DONE] and has nothing else."""
    parts = answer.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part[6:]) for part in parts[:-2]]


def test_chat(url: str, tokenizer: FakeTokenizer) -> None:
    answer = post(
        url, "/v1/chat/completions", {"model": "tiny-chat", "messages": USER}, headers={"x-request-id": "abc"}
    )
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "abc"
    body = answer.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert abs(body.pop("created") - time.time()) < 5
    assert body == {
        "object": "chat.completion",
        "model": "tiny-chat",
        "system_fingerprint": "tiny-chat@r1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 5,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
    sent = tokenizer.requests[-1]
    assert sent.prompt == ChatPrompt(json.dumps(USER, separators=(",", ":")).encode())
    assert sent.sampling.temperature == 0.0  # the model's default
    assert sent.sampling.max_tokens is None
    assert sent.sampling.seed is not None
    assert sent.engine == "tiny-chat@r1"


def test_chat_stream_bytes(url: str) -> None:
    body = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
    answer = post(url, "/v1/chat/completions", body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(answer)
    head = {key: chunks[0][key] for key in ("id", "object", "created", "model", "system_fingerprint")}
    assert head["object"] == "chat.completion.chunk"

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**head, "choices": [choice], "usage": None}

    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert chunks == [
        chunk({"role": "assistant", "content": "", "refusal": None}),
        *(chunk({"content": word}) for word in WORDS),
        chunk({}, "stop"),
        {**head, "choices": [], "usage": usage},
    ]
    assert b'"content":"\\"\\n"' in answer.content
    assert '"content":" wör"'.encode() in answer.content


def test_chat_stream_without_usage(url: str) -> None:
    chunks = events(post(url, "/v1/chat/completions", {"messages": USER, "stream": True, "n": 2}))
    assert all("usage" not in chunk for chunk in chunks)
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == TEXT
        assert mine[0]["delta"]["role"] == "assistant"
        assert mine[-1]["finish_reason"] == "stop"


def test_chat_logprobs(url: str) -> None:
    body = {"messages": USER, "logprobs": True, "top_logprobs": 2, "max_tokens": 2}
    (choice,) = post(url, "/v1/chat/completions", body).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["refusal"] is None
    assert choice["logprobs"]["content"][1] == {
        "token": "lo",
        "logprob": -0.25,
        "bytes": [108, 111],
        "top_logprobs": [
            {"token": "lo", "logprob": -0.25, "bytes": [108, 111]},
            {"token": "?", "logprob": -9999.0, "bytes": [63]},
        ],
    }
    streamed = events(post(url, "/v1/chat/completions", {**body, "stream": True}))
    found = [item for c in streamed for item in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert found == choice["logprobs"]["content"]


def test_chat_passes_tools_and_flattens_content(url: str, tokenizer: FakeTokenizer) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": " brief"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    body = {
        "messages": turns,
        "tools": [tool],
        "tool_choice": "auto",
        "chat_template_kwargs": {"enable_thinking": True},
    }
    assert post(url, "/v1/chat/completions", body).status_code == 200
    prompt = tokenizer.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    sent = json.loads(prompt.messages)
    assert sent[0] == {"role": "system", "content": "be brief"}
    assert sent[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert sent[1]["reasoning_content"] == "hm"
    assert json.loads(prompt.tools or b"") == [tool]
    assert json.loads(prompt.template_kwargs or b"") == {"enable_thinking": True}
    post(url, "/v1/chat/completions", {**body, "tool_choice": "none"})
    prompt = tokenizer.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.tools is None


def test_sampling_fields_arrive(url: str, tokenizer: FakeTokenizer) -> None:
    body = {
        "messages": USER,
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100, "6": 1.5},
        "min_tokens": 1,
        "max_completion_tokens": 9,
        "stop": "x",
        "stop_token_ids": [7],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "seed": 3,
        "priority": -2,
        "cache_salt": "s",
    }
    assert post(url, "/v1/chat/completions", body).status_code == 200
    sent = tokenizer.requests[-1]
    assert sent.sampling == SamplingParams(
        n=2,
        temperature=0.5,
        top_p=0.9,
        top_k=0,
        min_p=0.1,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias={5: -100.0, 6: 1.5},
        min_tokens=1,
        max_tokens=9,
        stop=("x",),
        stop_token_ids=(7,),
        ignore_eos=True,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        seed=3,
    )
    assert (sent.priority, sent.cache_salt) == (-2, "s")


def test_completion(url: str, tokenizer: FakeTokenizer) -> None:
    body = post(url, "/v1/completions", {"model": "tiny-chat", "prompt": "abc"}).json()
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created")
    assert body == {
        "object": "text_completion",
        "model": "tiny-chat",
        "system_fingerprint": "tiny-chat@r1",
        "choices": [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 5,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
    assert tokenizer.requests[-1].sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("a", 1), (["a", "b"], 2), ([1, 2], 1), ([[1, 2], [3]], 2)],
    ids=["text", "texts", "ids", "lists"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_completion_prompts(url: str, tokenizer: FakeTokenizer, prompt: Any, count: int, stream: bool) -> None:
    before = len(tokenizer.requests)
    answer = post(url, "/v1/completions", {"prompt": prompt, "n": 2, "echo": True, "stream": stream})
    assert answer.status_code == 200
    chunks = events(answer) if stream else [answer.json()]
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    each = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    echoes = [item if isinstance(item, str) else "<1><2><3>" for item in each]
    assert texts == {2 * i + c: echoes[i] + TEXT for i in range(count) for c in (0, 1)}
    sent = tokenizer.requests[before:]
    assert len(sent) == count
    assert [s.prompt.ids for s in sent if isinstance(s.prompt, TokensPrompt)] == [
        i for i in each if not isinstance(i, str)
    ]
    assert len({s.sampling.seed for s in sent}) == count


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(url: str, stream: bool) -> None:
    body = {"prompt": [1, 2, 3], "echo": True, "logprobs": 1, "max_tokens": 1, "stream": stream}
    answer = post(url, "/v1/completions", body)
    gathered: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chunk in events(answer) if stream else [answer.json()]:
        for choice in chunk["choices"]:
            for key, values in (choice["logprobs"] or {}).items():
                gathered[key] += values
    assert gathered == {
        # The fake's prompt text does not end with these tokens' texts, so the first one's is unknown.
        "tokens": ["", "Hel", "lo", "Hel"],
        "token_logprobs": [None, -0.25, -0.25, -0.25],
        "top_logprobs": [None, {"Hel": -0.25}, {"lo": -0.25}, {"Hel": -0.25}],
        "text_offset": [0, 0, 3, 5],
    }


def test_echo_alone_scores_the_prompt(url: str) -> None:
    body = post(url, "/v1/completions", {"prompt": "abc", "echo": True, "logprobs": 0, "max_tokens": 0}).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.25]
    assert choice["logprobs"]["top_logprobs"] is None
    assert body["usage"]["completion_tokens"] == 0


def test_return_token_ids_and_prompt_logprobs(url: str) -> None:
    body = {"prompt": [5, 6, 7], "return_token_ids": True, "prompt_logprobs": 1, "max_tokens": 2}
    (choice,) = post(url, "/v1/completions", body).json()["choices"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([10, 11], [5, 6, 7])
    entry = {"logprob": -0.25, "rank": 1, "decoded_token": "Hel"}
    assert choice["prompt_logprobs"][:2] == [None, {"10": entry}]


# Field or whole body -> (status, param, code). `type` follows from the code and is asserted too.
BAD = [
    ({"model": "no-such"}, 404, "model", "model_not_found"),
    ({"model": 3}, 400, "model", "invalid_type"),
    ({"temperature": -1}, 400, "temperature", "invalid_value"),
    ({"temperature": 1e300}, 400, "temperature", "invalid_value"),
    ({"temperature": 10**400}, 400, "temperature", "invalid_value"),
    ({"temperature": "hot"}, 400, "temperature", "invalid_type"),
    ({"temperature": True}, 400, "temperature", "invalid_type"),
    ({"top_p": 0}, 400, "top_p", "invalid_value"),
    ({"top_p": 1.5}, 400, "top_p", "invalid_value"),
    ({"top_k": -2}, 400, "top_k", "invalid_value"),
    ({"top_k": 10**30}, 400, "top_k", "invalid_value"),
    ({"min_p": 2}, 400, "min_p", "invalid_value"),
    ({"presence_penalty": 3}, 400, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -2.1}, 400, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "invalid_value"),
    ({"n": 0}, 400, "n", "invalid_value"),
    ({"n": 129}, 400, "n", "invalid_value"),
    ({"n": 1.5}, 400, "n", "invalid_type"),
    ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": -5}, 400, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens", "invalid_value"),
    ({"min_tokens": 9, "max_tokens": 3}, 400, "min_tokens", "invalid_value"),
    ({"seed": 2**63}, 400, "seed", "invalid_value"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias", "invalid_value"),
    ({"logit_bias": {"4096": 1}}, 400, "logit_bias", "invalid_value"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": "a"}}, 400, "logit_bias", "invalid_type"),
    ({"stop": ["x"] * 10_000}, 400, "stop", "invalid_value"),
    ({"stop": ""}, 400, "stop", "invalid_value"),
    ({"stop": "x" * 2000}, 400, "stop", "invalid_value"),
    ({"stop": [1]}, 400, "stop[0]", "invalid_type"),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids", "invalid_value"),
    ({"logprobs": 3}, 400, "logprobs", "invalid_type"),
    ({"top_logprobs": 3}, 400, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
    ({"stream": "yes"}, 400, "stream", "invalid_type"),
    ({"messages": []}, 400, "messages", "invalid_value"),
    ({"messages": None}, 400, "messages", "invalid_type"),
    ({"messages": [*USER, {"role": "user", "content": 5}]}, 400, "messages[1].content", "invalid_type"),
    ({"messages": [{"content": "x"}]}, 400, "messages[0].role", "missing_field"),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "missing_field"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages[0].content[0].type",
        "unsupported",
    ),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type", "unsupported"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "missing_field"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, 400, "guided_regex", "invalid_value"),
    ({"structured_outputs": {"regex": 3}}, 400, "structured_outputs.regex", "invalid_type"),
    ({"structured_outputs": {"regexp": "a"}}, 400, "structured_outputs.regexp", "unknown_field"),
    ({"tool_choice": "required"}, 400, "tool_choice", "unsupported"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "tool_choice", "unsupported"),
    ({"audio": {"voice": "x"}}, 400, "audio", "unsupported"),
    ({"modalities": ["audio"]}, 400, "modalities", "unsupported"),
    ({"tools": [{"type": "web"}]}, 400, "tools[0].function", "missing_field"),
    ({"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs", "unsupported"),
    ({"continue_final_message": True}, 400, "continue_final_message", "invalid_value"),
    ({"priority": 2**40}, 400, "priority", "invalid_value"),
    ({"timeout_s": -1}, 400, "timeout_s", "invalid_value"),
    ({"timeout": 0}, 400, "timeout", "invalid_value"),
    ({"timeout": 86_401}, 400, "timeout", "invalid_value"),
    ({"timeout": "1"}, 400, "timeout", "invalid_type"),
]


def assert_error(answer: httpx.Response, status: int, param: str | None, code: str) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    kind = {429: "rate_limit_error", 500: "server_error", 504: "timeout_error"}.get(status, "invalid_request_error")
    assert (error["type"], error["param"], error["code"]) == (kind, param, code)
    assert 5 < len(error["message"]) < 400
    return str(error["message"])


@pytest.mark.parametrize(("change", "status", "param", "code"), BAD, ids=[str(row[0])[:50] for row in BAD])
def test_bad_chat(url: str, change: dict[str, Any], status: int, param: str, code: str) -> None:
    assert_error(post(url, "/v1/chat/completions", {"messages": USER, **change}), status, param, code)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({}, "prompt", "missing_field"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt[0]", "invalid_value"),
        ({"prompt": ["a", 1]}, "prompt", "invalid_type"),
        ({"prompt": [1, 4096]}, "prompt", "invalid_value"),
        ({"prompt": [[1], [-1]]}, "prompt[1]", "invalid_value"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]", "invalid_type"),
        ({"prompt": ["a"] * 3000}, "prompt", "invalid_value"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_type"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported"),
        ({"prompt": "a", "best_of": 3}, "best_of", "unsupported"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "invalid_value"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"prompt": "reject"}, "prompt", "context_length_exceeded"),
        ({"prompt": ["fine", "reject"]}, "prompt", "context_length_exceeded"),
        ({"prompt": "reject", "stream": True}, "prompt", "context_length_exceeded"),
    ],
)
def test_bad_completion(url: str, change: dict[str, Any], param: str, code: str) -> None:
    assert_error(post(url, "/v1/completions", change), 400, param, code)


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_type"),
        (b"null", 400, "invalid_type"),
        (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400, "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_json"),
        (b'{"temperature": NaN}', 400, "invalid_json"),
        (b'{"temperature": 1e999}', 400, "invalid_json"),
        (b'{"n": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b"[" * 50_000, 400, "invalid_json"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, 400, "invalid_json"),
        (b" " * 100_001, 413, "body_too_large"),
        (b" " * 30_000_000, 413, "body_too_large"),
    ],
    ids=range(13),
)
@pytest.mark.parametrize("chunked", [False, True])
def test_bad_bodies(url: str, content: bytes, status: int, code: str, chunked: bool) -> None:
    data: Any = (content[at : at + 65536] for at in range(0, len(content), 65536)) if chunked else content
    answer = httpx.post(url + "/v1/chat/completions", content=data, timeout=10)
    assert_error(answer, status, None, code)


@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"])
def test_body_too_large_is_refused_before_it_is_sent(url: str, expect: bytes) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + expect + b"Content-Length: 9999999999\r\n\r\n"
    with raw(url, head) as connection:
        got = b""
        while b"body_too_large" not in got:
            part = connection.recv(1000)
            assert part
            got += part
    assert got.startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in got


def test_unknown_path_and_method(url: str) -> None:
    assert_error(httpx.get(url + "/v1/nothing"), 404, None, "not_found")
    answer = httpx.get(url + "/v1/chat/completions")
    assert_error(answer, 405, None, "method_not_allowed")
    assert "POST" in answer.headers["allow"]
    assert_error(httpx.get(url + "/v1/models/other"), 404, "model", "model_not_found")


def test_models_version_health(url: str, pair: tuple[Doors, FakeTokenizer]) -> None:
    card = {
        "id": "tiny-chat",
        "created": 1_700_000_000,
        "max_model_len": 2048,
        "root": "tiny-chat@r1",
        "object": "model",
        "owned_by": "quire",
    }
    assert httpx.get(url + "/v1/models").json() == {"data": [card], "object": "list"}
    assert httpx.get(url + "/v1/models/tiny-chat").json() == card
    assert httpx.get(url + "/version").json() == {"version": "1.2.3"}
    assert httpx.get(url + "/health/live").json() == {"live": True}
    assert httpx.get(url + "/health/ready").json() == {"ready": True, "state": "ready"}
    assert httpx.get(url + "/health").status_code == 200
    figures = pair[0].figures
    figures.progressing = False
    try:
        answer = httpx.get(url + "/health")
        assert answer.status_code == 503
        assert answer.json() == {"live": True, "ready": True, "progressing": False, "state": "ready"}
    finally:
        figures.progressing = True


def test_loading(url: str, pair: tuple[Doors, FakeTokenizer]) -> None:
    figures = pair[0].figures
    before = figures.reply
    figures.state, figures.reply = "loading", StatsReply(1, "loading", {})
    try:
        answer = post(url, "/v1/completions", {"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert answer.headers["retry-after"] == "1"
        ready = httpx.get(url + "/health/ready")
        assert (ready.status_code, ready.json()["state"], ready.headers["retry-after"]) == (503, "loading", "1")
        assert httpx.get(url + "/health/live").status_code == 200
        figures.reply = before  # the last word was "loading", but by now it is not true: asked anew
        assert post(url, "/v1/completions", {"prompt": "a"}).status_code == 200
    finally:
        figures.state, figures.reply = "ready", before


def test_stats_and_metrics(url: str, pair: tuple[Doors, FakeTokenizer]) -> None:
    engine = EngineSnapshot(running=3, steps=7)
    engine.step.observe(0.002)
    pair[0].figures.reply = StatsReply(1, "ready", {"scheduler": msgspec.msgpack.encode(engine)}, {"port": 1})
    found = httpx.get(url + "/stats").json()
    assert (found["state"], found["server"], found["engine"]["running"]) == ("ready", {"port": 1}, 3)
    assert found["engine"]["step"]["count"] == 1
    text = httpx.get(url + "/metrics").text
    assert "\nquire_engine_running 3.0\n" in text
    assert "\nquire_engine_steps_total 7.0\n" in text
    assert '\nquire_state{state="ready"} 1.0\n' in text
    assert '\nquire_engine_step_seconds_bucket{le="0.001"} 0.0\n' in text
    assert '\nquire_engine_step_seconds_bucket{le="0.0025"} 1.0\n' in text
    assert '\nquire_engine_step_seconds_bucket{le="+Inf"} 1.0\n' in text
    assert "# TYPE quire_engine_busy_seconds_total counter" in text or "quire_engine_busy_seconds_total 0.0" in text


def raw(url: str, request: bytes) -> socket.socket:
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5)
    connection.sendall(request)
    return connection


def raw_post(url: str, body: dict[str, Any]) -> socket.socket:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    return raw(url, head.encode() + content)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hang", "flood"])
def test_disconnect_aborts(url: str, tokenizer: FakeTokenizer, stream: bool, prompt: str) -> None:
    before, sent = len(tokenizer.aborted), len(tokenizer.requests)
    connection = raw_post(url, {"prompt": prompt, "stream": stream})
    while len(tokenizer.requests) == sent:
        time.sleep(0.001)
    connection.close()
    assert tokenizer.wait_for_abort(before + 1) < 0.5
    assert tokenizer.aborted[-1] == tokenizer.requests[-1].request_id


def test_failure_after_the_stream_began(url: str) -> None:
    answer = post(url, "/v1/completions", {"prompt": "fail", "stream": True})
    assert answer.status_code == 200
    *chunks, last = [part for part in answer.text.split("\n\n") if part]
    assert len(chunks) == 2
    assert json.loads(last[6:]) == {
        "error": {"message": "rank 0 died", "type": "server_error", "param": None, "code": "worker_failed"}
    }
    assert_error(post(url, "/v1/completions", {"prompt": "fail"}), 500, None, "worker_failed")


def test_errors_are_counted(pair: tuple[Doors, FakeTokenizer]) -> None:
    errors = pair[0].engine.counts.errors
    before = dict(errors)
    post(pair[0].url, "/v1/completions", {"prompt": []})
    post(pair[0].url, "/v1/completions", {"prompt": "busy"})
    post(pair[0].url, "/v1/completions", {"prompt": "fail", "stream": True})
    grown = {code: errors[code] - before.get(code, 0) for code in ("invalid_value", "queue_full", "worker_failed")}
    assert grown == {"invalid_value": 1, "queue_full": 1, "worker_failed": 1}


def test_a_deadline_is_passed_on(url: str, tokenizer: FakeTokenizer) -> None:
    assert post(url, "/v1/completions", {"prompt": "a", "timeout_s": 30}).status_code == 200
    deadline_s = tokenizer.requests[-1].deadline_s
    assert deadline_s is not None
    assert 25 < deadline_s - time.monotonic() < 30


@pytest.mark.parametrize(
    ("fields", "header", "least"),
    [({"timeout": 20}, None, 20), ({"timeout": 40, "timeout_s": 30}, "20", 20), ({"timeout": 30}, "50.5", 30)],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_shortest_timeout_counts(
    url: str, tokenizer: FakeTokenizer, path: str, fields: dict[str, Any], header: str | None, least: int
) -> None:
    headers = {} if header is None else {"x-request-timeout-s": header}
    asked = {"prompt": "a"} if path == "/v1/completions" else {"messages": USER}
    assert post(url, path, {**asked, **fields}, headers=headers).status_code == 200
    deadline_s = tokenizer.requests[-1].deadline_s
    assert deadline_s is not None
    assert least - 5 < deadline_s - time.monotonic() < least


@pytest.mark.parametrize("value", ["", "soon", "nan", "inf", "0", "-1", "1e9"])
def test_a_bad_timeout_header(url: str, value: str) -> None:
    answer = post(url, "/v1/completions", {"prompt": "a"}, headers={"x-request-timeout-s": value})
    assert_error(answer, 400, "x-request-timeout-s", "invalid_value")


def test_a_deadline_ends_what_nobody_else_ends(url: str, tokenizer: FakeTokenizer) -> None:
    before = len(tokenizer.aborted)
    answer = post(url, "/v1/completions", {"prompt": "hang", "timeout": 0.05})
    assert_error(answer, 504, None, "deadline_exceeded")
    tokenizer.wait_for_abort(before + 1)
    answer = post(url, "/v1/completions", {"prompt": "hang", "timeout": 0.05, "stream": True})
    assert answer.status_code in (200, 504)  # 504 where it had not begun


def test_a_deadline_in_a_stream_is_an_event(url: str, tokenizer: FakeTokenizer) -> None:
    before = len(tokenizer.aborted)
    answer = post(url, "/v1/completions", {"prompt": "hang", "timeout": 0.6, "stream": True})
    assert answer.status_code == 200
    last = [part for part in answer.text.split("\n\n") if part][-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    tokenizer.wait_for_abort(before + 1)


def test_whose_request_it_is(url: str, tokenizer: FakeTokenizer) -> None:
    for fields, user in (
        ({"user": "ada"}, "ada"),
        ({"safety_identifier": "eve"}, "eve"),
        ({}, ""),
    ):
        assert post(url, "/v1/completions", {"prompt": "a", **fields}).status_code == 200
        assert (tokenizer.requests[-1].tenant, tokenizer.requests[-1].user) == ("", user)
    assert post(url, "/v1/completions", {"prompt": "a", "user": "ü" * 5000}).status_code == 200
    assert len(tokenizer.requests[-1].user) == 32


def test_the_keys_holder_is_the_tenant(folder: Path) -> None:
    with doors(folder, keys=Keys(["sk-1"])) as (running, tokenizer):
        for path, asked in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": USER})):
            body = {**asked, "user": "ada"}
            assert post(running.url, path, body, headers={"authorization": "Bearer sk-1"}).status_code == 200
            assert tokenizer.requests[-1].tenant.startswith("key-")
            assert tokenizer.requests[-1].user == "ada"


def test_queue_full(url: str) -> None:
    answer = post(url, "/v1/completions", {"prompt": "busy"})
    assert_error(answer, 429, None, "queue_full")
    assert answer.headers["retry-after"] == "3"


def test_keep_alive_comments_while_nothing_happens(url: str) -> None:
    with raw_post(url, {"prompt": "hang", "stream": True}) as connection:
        got = b""
        while got.count(b": keep-alive\n\n") < 2:
            got += connection.recv(1000)
    assert got.startswith(b"HTTP/1.1 200")


def test_own_limit_and_strict_fields(folder: Path) -> None:
    with doors(folder, strict=True, max_live=2) as (running, _):
        with raw_post(running.url, {"prompt": "hang", "n": 2}):
            deadline = time.monotonic() + 3
            while running.engine.num_live < 2 and time.monotonic() < deadline:
                time.sleep(0.005)
            answer = post(running.url, "/v1/completions", {"prompt": "a"})
            assert_error(answer, 429, None, "queue_full")
            assert answer.headers["retry-after"] == "1"
        answer = post(running.url, "/v1/completions", {"prompt": "a", "bogus": 1})
        assert "bogus" in assert_error(answer, 400, "bogus", "unknown_field")


def test_unknown_fields_are_ignored(url: str) -> None:
    assert post(url, "/v1/completions", {"prompt": "a", "bogus": 1}).status_code == 200


def test_slow_reader_is_bounded(folder: Path) -> None:
    with (
        doors(folder, max_buffered=500) as (running, tokenizer),
        raw_post(running.url, {"prompt": "flood", "stream": True}) as connection,
    ):
        tokenizer.wait_for_abort(within_s=20)
        got = b""
        while b"client_too_slow" not in got[-2000:]:
            part = connection.recv(1 << 20)
            assert part
            got += part
        assert b"[DONE]" not in got
