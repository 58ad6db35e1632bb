"""Collect: the whole answer of a request that does not stream."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.types import Receive

from api.engine_client import Stream
from api.sse import watch
from core.messages import Delta, Finished, Started, TokenText


class ChoiceOutput(msgspec.Struct):
    """One choice, gathered from its Deltas."""

    texts: list[str] = []
    token_ids: list[int] = []
    logprobs: list[TokenText] = []
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class PromptOutput(msgspec.Struct):
    """All choices of one prompt."""

    choices: list[ChoiceOutput]
    started: Started | None = None
    finished: Finished | None = None
    prompt_logprobs: list[TokenText | None] = []

    def add(self, delta: Delta) -> None:
        choice = self.choices[delta.choice]
        if delta.text:
            choice.texts.append(delta.text)
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
            choice.stop_reason = delta.stop_reason


async def collect(stream: Stream, receive: Receive, n: int) -> list[PromptOutput]:
    """Wait for every prompt's ending; aborts when the client goes away (ClientGone) and on any error (QuireError)."""
    async with stream:
        outputs = [PromptOutput([ChoiceOutput() for _ in range(n)]) for _ in stream.requests]
        watcher = asyncio.create_task(watch(receive, stream))
        try:
            async for news in stream:
                for index, event in news:
                    match event:
                        case Delta():
                            outputs[index].add(event)
                        case Started():
                            outputs[index].started = event
                        case Finished():
                            outputs[index].finished = event
        finally:
            watcher.cancel()
        return outputs
