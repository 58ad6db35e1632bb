"""EngineClient: the one way into the engine, shared by the HTTP and the ZeroMQ door.

It sends requests to the tokenizer processes and hands their news to whoever waits. A frame carries a step's news of
many requests; each consumer is woken once per frame, and no task is made per token.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NoReturn

import msgspec
import zmq

from api.journal import Journal
from core.admission import Bounds
from core.channel import ChannelFull, Client
from core.deadlines import Deadlines
from core.errors import QuireError
from core.messages import (
    Abort,
    ChatPrompt,
    Delta,
    Failed,
    Finished,
    FromTokenizer,
    Generate,
    Prompt,
    QueueState,
    Rejected,
    Started,
)
from core.stats import ApiSnapshot
from quire import SamplingParams

log = logging.getLogger("quire.api")

Event = Started | Delta | Finished

MAX_BUFFERED_DELTAS = 4096  # unread news of one stream; some 2 MB, and half a minute at 128 tokens/s
RETRY_AFTER_S = 1.0
WHOLE = 32  # delta_tokens of an answer that is not streamed: what a restart below may have to compute again
LATE_S = 0.2  # after its deadline a request is ended here, if nobody below has done so
_UNBOUNDED = Bounds(2**63, 2**63, 2**63)
MAX_FRAMES_PER_TURN = 64  # frames taken before other tasks of the loop get their turn


class ClientGone(Exception):
    """The consumer of a stream went away; raised inside whatever still waits for its news."""


class Stream:
    """The news of the requests that one call made, as lists of (index of the prompt, event).

    Iterate over it; iteration ends when every request has its Finished, and raises QuireError when one is rejected or
    fails (the others are aborted). Leaving its context before the end aborts.
    """

    def __init__(self, client: EngineClient, max_buffered: int) -> None:
        self.requests: list[Live] = []
        self.num_open = 0
        self._client = client
        self._max_buffered = max_buffered
        self._news: list[tuple[int, Event]] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._poked = False

    def push(self, index: int, event: Event) -> None:
        """Add an event and wake the consumer (EngineClient's part)."""
        if self._error is not None:
            return
        self._news.append((index, event))
        if isinstance(event, Finished):
            self.num_open -= 1
        elif len(self._news) > self._max_buffered:
            text = f"{self._max_buffered} pieces of output were waiting to be read; the request was aborted"
            self.fail(QuireError("client_too_slow", text))
        self._wake()

    def fail(self, error: Exception) -> None:
        """End with an error: everything still open is aborted; what was pushed before can still be read."""
        if self._error is None and self.num_open:
            self._error = error
            self._client.abort(self)
            self._wake()

    def close(self) -> None:
        """The consumer is gone: abort what is open."""
        self._news.clear()
        self.fail(ClientGone())

    def poke(self) -> None:
        """Let the consumer have a turn with an empty list, if it waits for news."""
        self._poked = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[tuple[int, Event]]:
        while not self._news:
            if self._error is not None:
                raise self._error
            if self.num_open == 0:
                raise StopAsyncIteration
            if self._poked:
                break
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        news, self._news, self._poked = self._news, [], False
        return news

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Live:
    """A request under way: its journal, the tokenizer that has it, and the stream that reads it."""

    __slots__ = ("first_s", "index", "journal", "last_s", "link", "started", "stream")

    def __init__(self, journal: Journal, link: int, stream: Stream, index: int) -> None:
        self.last_s: list[float | None] = [None] * len(journal.choices)  # when each choice last had tokens
        self.first_s = 0.0  # when the first token of any choice came
        self.journal = journal
        self.link = link
        self.stream = stream
        self.index = index
        self.started = False  # the client has been told


class EngineClient:
    """Connections to all tokenizer processes and the requests that are under way.

    Args:
        links: one Channel client per tokenizer process.
        engine: "name@revision" of the engine that requests go to.
        prefix: begins every request id; unique to this process and this life of it.
        max_live: sequences under way at which new requests are refused with `queue_full`; bounds this process's memory.
        bounds: what the whole server takes. The scheduler applies them exactly. Here they are applied as far as is
            known, before a prompt is tokenized, and only to those who have their share under way: anybody else may
            take the place of somebody who has more.
        max_buffered: see MAX_BUFFERED_DELTAS.
    """

    def __init__(
        self,
        links: Sequence[Client[FromTokenizer]],
        engine: str,
        prefix: str,
        *,
        max_live: int,
        bounds: Bounds = _UNBOUNDED,
        max_buffered: int = MAX_BUFFERED_DELTAS,
    ) -> None:
        self.draining = False
        self.live: dict[str, Live] = {}
        self.num_live = 0  # sequences
        self.counts = ApiSnapshot()
        self._links = list(links)
        self._load = [0] * len(self._links)
        self._engine = engine
        self._prefix = prefix
        self._max_live = max_live
        self._max_buffered = max_buffered
        self._draw = random.SystemRandom()
        self._lives: dict[str, int] = {}  # process -> the life of it that is known here
        self._bounds = bounds
        self._queue_state = QueueState(0, 0, 0)
        self._by_client: dict[tuple[str, str], int] = {}  # (tenant, user) -> requests under way
        self._deadlines = Deadlines(self.live)
        self._alarm: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to read the sockets on the running event loop."""
        loop = asyncio.get_running_loop()
        for link, channel in enumerate(self._links):
            loop.add_reader(channel.socket.getsockopt(zmq.FD), self._read, link)
            loop.call_soon(self._read, link)

    def stop(self) -> None:
        """Stop reading; streams that are open fail."""
        loop = asyncio.get_running_loop()
        for channel in self._links:
            loop.remove_reader(channel.socket.getsockopt(zmq.FD))
        if self._alarm is not None:
            self._alarm.cancel()
        for live in list(self.live.values()):
            live.stream.fail(QuireError("draining", "the server is stopping", None, RETRY_AFTER_S))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        deadline_s: float | None = None,
        want_text: bool = True,
        want_prompt: bool = False,
        delta_tokens: int = 1,
        tenant: str = "",
        user: str = "",
    ) -> Stream:
        """Send one request per prompt, each for `sampling.n` choices. Use the answer with `async with`.

        `delta_tokens`: see Generate; WHOLE where the answer is not streamed, which costs far less. Without a seed each
        request draws its own here, so that a restart below draws the same tokens again. `deadline_s`: CLOCK_MONOTONIC.
        `tenant` and `user` are whose share of the server it takes.
        Raises QuireError: draining, queue_full, deadline_exceeded.
        """
        if self.draining:
            raise QuireError("draining", "the server is stopping; send the request again", None, RETRY_AFTER_S)
        if self.num_live + len(prompts) * sampling.n > self._max_live and self.num_live:
            text = f"{self.num_live} sequences are under way in this api process (it takes {self._max_live})"
            self._refuse("sequences", f"{text}; try again later")
        self._check_bounds(tenant, user)
        if deadline_s is not None and deadline_s <= time.monotonic():
            raise QuireError("deadline_exceeded", "the request's deadline passed before it was taken")
        stream = Stream(self, self._max_buffered)
        arrival_s = time.monotonic()
        try:
            for index, prompt in enumerate(prompts):
                self.counts.requests += 1
                seeded = sampling
                if sampling.seed is None:
                    seeded = msgspec.structs.replace(sampling, seed=self._draw.getrandbits(63))
                request = Generate(
                    request_id=f"{self._prefix}{self.counts.requests}",
                    engine=self._engine,
                    prompt=prompt,
                    sampling=seeded,
                    priority=priority,
                    cache_salt=cache_salt,
                    arrival_s=arrival_s,
                    deadline_s=deadline_s,
                    want_text=want_text,
                    want_prompt=want_prompt,
                    delta_tokens=delta_tokens,
                    tenant=tenant,
                    user=user,
                )
                self._begin(Live(Journal(request), self._load.index(min(self._load)), stream, index))
        except ChannelFull:
            stream.close()
            raise QuireError("queue_full", "the engine does not take requests now", None, RETRY_AFTER_S) from None
        return stream

    def _check_bounds(self, tenant: str, user: str) -> None:
        """Refuse early whom the scheduler would refuse. Raises QuireError("queue_full")."""
        state, under_way = self._queue_state, len(self.live)
        reached = self._bounds.reached(state.waiting, state.waiting_tokens, max(state.requests, under_way))
        own = self._by_client.get((tenant, user), 0)
        if reached is not None and own and own * len(self._by_client) >= under_way:
            self._refuse(reached.bound, reached.message)

    def _refuse(self, bound: str, text: str) -> NoReturn:
        self.counts.refused[bound] = self.counts.refused.get(bound, 0) + 1
        raise QuireError("queue_full", text, None, max(RETRY_AFTER_S, self._queue_state.drain_s))

    def note_lives(self, facts: Mapping[str, str | int | float]) -> None:
        """Take the supervisor's facts: requests of a tokenizer or scheduler that was restarted go on from the journal.

        `facts["life.NAME"]` counts the lives of process NAME in which it became ready.
        """
        for link in range(len(self._links)):
            anew = [self._is_new(name, facts) for name in (f"tokenizer-{link}", f"scheduler/{link}")]
            if any(anew):
                self._resume(link)

    def fail_all(self, error: QuireError) -> None:
        """The engine will not come back: every open stream ends with `error`."""
        for live in list(self.live.values()):
            if live.journal.request.request_id in self.live:
                self.counts.failed += 1
                live.stream.fail(error)

    def _is_new(self, name: str, facts: Mapping[str, str | int | float]) -> bool:
        life = int(facts.get("life." + name.partition("/")[0], 1))
        known = self._lives.get(name, 1)
        self._lives[name] = max(life, known)
        return life > known

    def _resume(self, link: int) -> None:
        """Send every request of a link again, as its journal has it."""
        for live in [live for live in self.live.values() if live.link == link]:
            try:
                self._links[link].send([live.journal.resume()])
            except ChannelFull:
                live.stream.fail(QuireError("engine_failed", "the engine does not take the request back"))
                continue
            if live.started:
                live.stream.poke()  # a comment keeps the connection open
        asyncio.get_running_loop().call_soon(self._read, link)

    def snapshot(self) -> ApiSnapshot:
        """What the heartbeat carries."""
        self.counts.live = len(self.live)
        return self.counts

    def abort(self, stream: Stream) -> None:
        """Tell the tokenizers to free everything of a stream's open requests, now."""
        for live in stream.requests:
            request = live.journal.request
            if self._end(request.request_id) is not None:
                self.counts.aborted += 1
                for choice in live.journal.choices:
                    if not choice.finished:
                        self._count_reason("abort")
                self._send_abort(live.link, request.request_id)

    def _begin(self, live: Live) -> None:
        request = live.journal.request
        live.stream.requests.append(live)
        live.stream.num_open += 1
        self.live[request.request_id] = live
        self.num_live += request.sampling.n
        self._load[live.link] += request.sampling.n
        client = (request.tenant, request.user)
        self._by_client[client] = self._by_client.get(client, 0) + 1
        if request.deadline_s is not None:
            self._deadlines.add(request.request_id, request.deadline_s + LATE_S)
            self._set_alarm()
        self._links[live.link].send([request])
        # Sending may take the socket's edge-triggered readiness with it: look again.
        asyncio.get_running_loop().call_soon(self._read, live.link)

    def _end(self, request_id: str) -> Live | None:
        live = self.live.pop(request_id, None)
        if live is not None:
            request = live.journal.request
            self.num_live -= request.sampling.n
            self._load[live.link] -= request.sampling.n
            client = (request.tenant, request.user)
            self._by_client[client] -= 1
            if not self._by_client[client]:
                del self._by_client[client]
        return live

    def _set_alarm(self) -> None:
        """See to it that `_expire` runs at the next deadline, or within a second."""
        if self._alarm is None and len(self._deadlines):
            wait_s = self._deadlines.wait_s(time.monotonic(), 1.0)
            self._alarm = asyncio.get_running_loop().call_later(wait_s, self._expire)

    def _expire(self) -> None:
        """End what is long past its deadline: tokenizer and scheduler do it sooner, unless they are away."""
        self._alarm = None
        for request_id in self._deadlines.expired(time.monotonic()):
            if (live := self.live.get(request_id)) is not None:
                self.counts.expired += 1
                live.stream.fail(QuireError("deadline_exceeded", "the request's deadline passed"))
        self._set_alarm()

    def _send_abort(self, link: int, request_id: str) -> None:
        try:
            self._links[link].send([Abort(request_id)])
        except ChannelFull:
            log.error("tokenizer-%d does not read: the abort of %s is lost", link, request_id)
            return
        asyncio.get_running_loop().call_soon(self._read, link)

    def _read(self, link: int) -> None:
        """Take the frames that are there; the rest of a long row of them after other tasks had their turn."""
        for _ in range(MAX_FRAMES_PER_TURN):
            try:
                messages = self._links[link].receive(0)
            except zmq.ZMQError:  # closed between the wake-up and this call
                return
            except msgspec.DecodeError:
                log.exception("tokenizer-%d sent a malformed frame", link)
                continue
            if messages is None:
                return
            self._dispatch(link, messages)
        asyncio.get_running_loop().call_soon(self._read, link)

    def _dispatch(self, link: int, messages: list[FromTokenizer]) -> None:
        now = time.monotonic()
        for message in messages:
            if isinstance(message, QueueState):
                self._queue_state = message
                continue
            live = self.live.get(message.request_id)
            if live is None:
                # News of an aborted request may still be under way. A request of this process's former life is not
                # known below to be dead: say so.
                if not isinstance(message, Finished | Rejected | Failed) and not message.request_id.startswith(
                    self._prefix
                ):
                    self._send_abort(link, message.request_id)
                continue
            match message:
                case Delta():
                    self._deliver(live, message, now)
                case Started():
                    self.counts.tokenize.observe(now - live.journal.request.arrival_s)
                    if not live.started:  # a resumed request starts again
                        live.started = True
                        live.stream.push(live.index, message)
                case Finished(request_id):
                    self._end(request_id)
                    self.counts.finished += 1
                    ending = live.journal.complete(message)
                    self._count(live, ending, now)
                    live.stream.push(live.index, ending)
                case Rejected(request_id, code, text, param, retry_after_s):
                    self._end(request_id)
                    self.counts.rejected += 1
                    if param == "messages" and not isinstance(live.journal.request.prompt, ChatPrompt):
                        param = "prompt"  # below nobody knows any more what the client called it
                    live.stream.fail(QuireError(code, text, param, retry_after_s))
                case Failed(request_id, code, text):
                    self._end(request_id)
                    self.counts.failed += 1
                    live.stream.fail(QuireError(code, text))

    def _count(self, live: Live, ending: Finished, now: float) -> None:
        """What is measured per request, at its ending."""
        request, counts = live.journal.request, self.counts
        counts.end_to_end.observe(now - request.arrival_s)
        counts.request_prompt_tokens.observe(ending.prompt_tokens)
        counts.request_output_tokens.observe(ending.completion_tokens)
        counts.request_choices.observe(request.sampling.n)
        if request.sampling.max_tokens is not None:
            counts.request_max_tokens.observe(request.sampling.max_tokens)
        # Choices run side by side: one of them has its share of the tokens.
        later = ending.completion_tokens / request.sampling.n - 1
        if live.first_s and later > 0:
            counts.time_per_token.observe((now - live.first_s) / later)

    def _count_reason(self, reason: str) -> None:
        reasons = self.counts.finish_reasons
        reasons[reason] = reasons.get(reason, 0) + 1

    def _deliver(self, live: Live, delta: Delta, now: float) -> None:
        try:
            fresh = live.journal.record(delta)
        except ValueError as error:
            log.error("%s: %s", delta.request_id, error)
            live.stream.fail(QuireError("internal_error", f"the output of this request is incomplete: {error}"))
            return
        if fresh is None:
            return
        if count := len(fresh.token_ids):
            last_s = live.last_s[fresh.choice]
            if last_s is None:
                self.counts.ttft.observe(now - live.journal.request.arrival_s)
            else:
                self.counts.inter_token.observe((now - last_s) / count, count)
            live.last_s[fresh.choice] = now
            live.first_s = live.first_s or now
        if fresh.finish_reason is not None:
            self._count_reason(fresh.finish_reason)
        live.stream.push(live.index, fresh)
