"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from api.body import read_body
from api.collect import collect
from api.engine_client import WHOLE, Event
from api.logprobs import chat_logprobs, prompt_logprobs
from api.schema.chat import ChatChoice, ChatCompletion, ChatMessage, ChatRequest, chat_request
from api.schema.deadline import earliest, header_deadline_s
from api.schema.usage import usage_of
from api.service import Service
from api.sse import EventStream
from core.messages import Delta, Finished, Started

_encode = msgspec.json.encode


async def chat_completions(service: Service, request: Request) -> ASGIApp:
    """Answer a conversation, as one JSON object or as a stream of chunks."""
    body = await read_body(request, service.max_body_bytes)
    chat = chat_request(body, service.model, strict_fields=service.strict_fields)
    await service.check_ready()
    stream = service.engine.generate(
        [chat.prompt],
        chat.sampling,
        priority=chat.priority,
        cache_salt=chat.cache_salt,
        deadline_s=earliest(chat.deadline_s, header_deadline_s(request.headers)),
        want_prompt=chat.return_token_ids,
        delta_tokens=1 if chat.stream else WHOLE,
        tenant=request.scope.get("key_holder") or "",
        user=chat.user,
    )
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    if chat.stream:
        return EventStream(stream, ChatWriter(answer_id, service, chat), service)

    (output,) = await collect(stream, request.receive, chat.sampling.n)
    choices = [
        ChatChoice(
            index=index,
            message=ChatMessage(choice.text),
            logprobs=chat_logprobs(choice.logprobs) if chat.sampling.logprobs is not None else None,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            token_ids=choice.token_ids if chat.return_token_ids else None,
        )
        for index, choice in enumerate(output.choices)
    ]
    assert output.finished is not None
    answer = ChatCompletion(
        id=answer_id,
        object="chat.completion",
        created=int(time.time()),
        model=service.model.name,
        choices=choices,
        usage=usage_of([output.finished]),
        system_fingerprint=service.model.engine,
        prompt_logprobs=prompt_logprobs(output.prompt_logprobs) if chat.sampling.prompt_logprobs is not None else None,
        prompt_token_ids=output.started.prompt_ids if chat.return_token_ids and output.started is not None else None,
    )
    return Response(_encode(answer), media_type="application/json")


class ChatWriter:
    """Chunks of one streamed chat answer. A choice begins with a chunk that only names the role, and ends with one that
    only has the finish_reason."""

    def __init__(self, answer_id: str, service: Service, chat: ChatRequest) -> None:
        model = service.model
        self._head = (
            b'data: {"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,"system_fingerprint":%b,'
            % (_encode(answer_id), int(time.time()), _encode(model.name), _encode(model.engine))
        )
        self._tail = b',"usage":null}\n\n' if chat.include_usage else b"}\n\n"
        self._include_usage = chat.include_usage
        self._token_ids = chat.return_token_ids
        self._n = chat.sampling.n
        # Everything of a chunk that stands before its text, per choice.
        self._before = [self._head + b'"choices":[{"index":%d,"delta":{"content":' % index for index in range(self._n)]
        self._after = b'},"logprobs":null,"finish_reason":null}]' + self._tail
        self._begun = False
        self._prompt_ids: list[int] | None = None
        self._finished: Finished | None = None

    def write(self, news: list[tuple[int, Event]]) -> bytes:
        """The chunks for a step's news."""
        parts: list[bytes] = []
        for _, event in news:
            match event:
                case Delta():
                    if not self._begun:
                        self._begin(parts)
                    if event.logprobs or (self._token_ids and event.token_ids):
                        parts.append(self._rich(event))
                    elif event.text:
                        parts += (self._before[event.choice], _encode(event.text), self._after)
                    if event.finish_reason is not None:
                        parts.append(self._finish(event))
                case Started():
                    self._prompt_ids = event.prompt_ids if self._token_ids else None
                case Finished():
                    self._finished = event
        return b"".join(parts)

    def end(self) -> bytes:
        """The chunk that carries the usage, where it was asked for."""
        if not self._include_usage or self._finished is None:
            return b""
        return self._head + b'"choices":[],"usage":' + _encode(usage_of([self._finished])) + b"}\n\n"

    def _begin(self, parts: list[bytes]) -> None:
        self._begun = True
        prompt = b"" if self._prompt_ids is None else b'"prompt_token_ids":%b,' % _encode(self._prompt_ids)
        for index in range(self._n):
            parts.append(
                self._head
                + prompt
                + b'"choices":[{"index":%d,"delta":{"role":"assistant","content":"","refusal":null},' % index
                + b'"logprobs":null,"finish_reason":null}]'
                + self._tail
            )

    def _rich(self, delta: Delta) -> bytes:
        """A chunk that carries more than text."""
        logprobs = _encode(chat_logprobs(delta.logprobs)) if delta.logprobs else b"null"
        ids = b',"token_ids":%b' % _encode(delta.token_ids) if self._token_ids else b""
        rest = b'},"logprobs":%b,"finish_reason":null%b}]' % (logprobs, ids)
        return self._before[delta.choice] + _encode(delta.text) + rest + self._tail

    def _finish(self, delta: Delta) -> bytes:
        stop = b"" if delta.stop_reason is None else b',"stop_reason":%b' % _encode(delta.stop_reason)
        return (
            self._head
            + b'"choices":[{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b%b}]'
            % (delta.choice, _encode(delta.finish_reason), stop)
            + self._tail
        )
