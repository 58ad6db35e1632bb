"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from api.body import read_body
from api.collect import ChoiceOutput, PromptOutput, collect
from api.engine_client import WHOLE, Event
from api.logprobs import completion_logprobs, prompt_logprobs
from api.schema.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    completion_request,
)
from api.schema.deadline import earliest, header_deadline_s
from api.schema.usage import usage_of
from api.service import Service
from api.sse import EventStream
from core.messages import Delta, Finished, Started, TextPrompt, TokenText

_encode = msgspec.json.encode


async def completions(service: Service, request: Request) -> ASGIApp:
    """Continue one prompt or several, as one JSON object or as a stream of chunks."""
    body = await read_body(request, service.max_body_bytes)
    asked = completion_request(body, service.model, strict_fields=service.strict_fields)
    await service.check_ready()
    stream = service.engine.generate(
        asked.prompts,
        asked.sampling,
        priority=asked.priority,
        cache_salt=asked.cache_salt,
        deadline_s=earliest(asked.deadline_s, header_deadline_s(request.headers)),
        want_prompt=asked.echo or asked.return_token_ids,
        delta_tokens=1 if asked.stream else WHOLE,
        tenant=request.scope.get("key_holder") or "",
        user=asked.user,
    )
    answer_id = f"cmpl-{uuid.uuid4().hex}"
    if asked.stream:
        return EventStream(stream, CompletionWriter(answer_id, service, asked), service)

    outputs = await collect(stream, request.receive, asked.sampling.n)
    choices: list[CompletionChoice] = []
    for prompt_index, output in enumerate(outputs):
        for choice in output.choices:
            choices.append(_choice(len(choices), asked, prompt_index, output, choice))
    answer = Completion(
        id=answer_id,
        created=int(time.time()),
        model=service.model.name,
        choices=choices,
        usage=usage_of((o.finished for o in outputs if o.finished is not None), drop_output=asked.drop_output),
        system_fingerprint=service.model.engine,
    )
    return Response(_encode(answer), media_type="application/json")


def _choice(
    index: int, asked: CompletionRequest, prompt_index: int, output: PromptOutput, choice: ChoiceOutput
) -> CompletionChoice:
    """One choice of the answer: with echo the prompt comes first, in text and in log-probabilities."""
    started = output.started
    echoed = _echo_text(asked, prompt_index, started) if asked.echo else ""
    logprobs: CompletionLogprobs | None = None
    if asked.sampling.logprobs is not None:
        tokens: list[TokenText | None] = [] if asked.drop_output else list(choice.logprobs)
        if asked.echo:
            tokens = [*output.prompt_logprobs, *tokens]
        first = _first_token_text(started, output.prompt_logprobs) if asked.echo else ""
        logprobs = completion_logprobs(tokens, count=asked.sampling.logprobs, offset=0, first_text=first)
    wants_prompt_logprobs = asked.sampling.prompt_logprobs is not None and not (asked.echo and logprobs is not None)
    return CompletionChoice(
        index=index,
        text=echoed if asked.drop_output else echoed + choice.text,
        logprobs=logprobs,
        finish_reason="length" if asked.drop_output else choice.finish_reason,
        stop_reason=None if asked.drop_output else choice.stop_reason,
        token_ids=([] if asked.drop_output else choice.token_ids) if asked.return_token_ids else None,
        prompt_token_ids=started.prompt_ids if asked.return_token_ids and started is not None else None,
        prompt_logprobs=prompt_logprobs(output.prompt_logprobs) if wants_prompt_logprobs else None,
    )


def _echo_text(asked: CompletionRequest, prompt_index: int, started: Started | None) -> str:
    """The prompt as the client sent it; token ids as their text."""
    prompt = asked.prompts[prompt_index]
    if isinstance(prompt, TextPrompt):
        return prompt.text
    return started.prompt_text if started is not None else ""


def _first_token_text(started: Started | None, tokens: list[TokenText | None]) -> str:
    """The text of a prompt's first token, which has no distribution of its own: what the others leave."""
    rest = "".join(token.text for token in tokens if token is not None)
    text = started.prompt_text if started is not None else ""
    return text[: len(text) - len(rest)] if text.endswith(rest) else ""


class CompletionWriter:
    """Chunks of one streamed answer; the choices of all prompts are numbered through."""

    def __init__(self, answer_id: str, service: Service, asked: CompletionRequest) -> None:
        model = service.model
        self._head = b'data: {"id":%b,"object":"text_completion","created":%d,"model":%b,"system_fingerprint":%b,' % (
            _encode(answer_id),
            int(time.time()),
            _encode(model.name),
            _encode(model.engine),
        )
        self._tail = b',"usage":null}\n\n' if asked.include_usage else b"}\n\n"
        self._asked = asked
        self._n = asked.sampling.n
        count = self._n * len(asked.prompts)
        self._before = [self._head + b'"choices":[{"index":%d,"text":' % index for index in range(count)]
        self._after = b',"logprobs":null,"finish_reason":null}]' + self._tail
        self._num_chars = [0] * count
        self._started: list[Started | None] = [None] * len(asked.prompts)
        self._echo_due = [asked.echo] * count
        self._prompt_logprobs: list[list[TokenText | None]] = [[] for _ in asked.prompts]
        self._finished: list[Finished] = []

    def write(self, news: list[tuple[int, Event]]) -> bytes:
        """The chunks for a step's news."""
        parts: list[bytes] = []
        for prompt_index, event in news:
            match event:
                case Delta():
                    self._delta(parts, prompt_index, event)
                case Started():
                    self._started[prompt_index] = event
                case Finished():
                    self._finished.append(event)
        return b"".join(parts)

    def end(self) -> bytes:
        """The chunk that carries the usage, where it was asked for."""
        if not self._asked.include_usage:
            return b""
        usage = usage_of(self._finished, drop_output=self._asked.drop_output)
        return self._head + b'"choices":[],"usage":' + _encode(usage) + b"}\n\n"

    def _delta(self, parts: list[bytes], prompt_index: int, delta: Delta) -> None:
        index = prompt_index * self._n + delta.choice
        if delta.prompt_logprobs:
            self._prompt_logprobs[prompt_index] += delta.prompt_logprobs
        if self._echo_due[index] and (delta.token_ids or delta.finish_reason is not None):
            self._echo_due[index] = False
            parts.append(self._echo(index, prompt_index))
        if not self._asked.drop_output:
            if delta.logprobs or (self._asked.return_token_ids and delta.token_ids):
                parts.append(self._rich(index, delta.text, list(delta.logprobs), delta.token_ids))
            elif delta.text:
                parts += (self._before[index], _encode(delta.text), self._after)
        if delta.finish_reason is not None:
            parts.append(self._finish(index, delta))

    def _echo(self, index: int, prompt_index: int) -> bytes:
        """The chunk of the prompt, before the first of the output."""
        started = self._started[prompt_index]
        tokens = self._prompt_logprobs[prompt_index] if self._asked.sampling.logprobs is not None else []
        first = _first_token_text(started, tokens)
        return self._rich(index, _echo_text(self._asked, prompt_index, started), tokens, [], first)

    def _rich(
        self, index: int, text: str, tokens: list[TokenText | None], token_ids: list[int], first_text: str = ""
    ) -> bytes:
        """A chunk that carries more than text."""
        logprobs = b"null"
        if tokens:
            count = self._asked.sampling.logprobs or 0
            offset = self._num_chars[index]
            entry = completion_logprobs(tokens, count=count, offset=offset, first_text=first_text)
            self._num_chars[index] += sum(len(token) for token in entry.tokens)
            logprobs = _encode(entry)
        ids = b',"token_ids":%b' % _encode(token_ids) if self._asked.return_token_ids else b""
        rest = b',"logprobs":%b,"finish_reason":null%b}]' % (logprobs, ids)
        return self._before[index] + _encode(text) + rest + self._tail

    def _finish(self, index: int, delta: Delta) -> bytes:
        reason = "length" if self._asked.drop_output else delta.finish_reason
        stop = b""
        if delta.stop_reason is not None and not self._asked.drop_output:
            stop = b',"stop_reason":%b' % _encode(delta.stop_reason)
        rest = b'"",' + b'"logprobs":null,"finish_reason":%b%b}]' % (_encode(reason), stop)
        return self._before[index] + rest + self._tail
