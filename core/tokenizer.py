"""The tokenizer process: requests to token ids on the way down, token ids to text on the way up.

It ends choices by text rules (stop strings) and makes the ending that the client sees. Long texts are encoded, and new
grammars checked, in threads (the libraries release the interpreter), so that nobody's stream waits for them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq

from core.arrivals import Arrival, Arrivals
from core.channel import ChannelFull, Client, PeerGone, Server
from core.chat_template import ChatTemplate
from core.deadlines import Deadlines, Known
from core.errors import QuireError
from core.grammar_check import GrammarCheck
from core.live_text import LiveText
from core.messages import (
    Abort,
    ChatPrompt,
    Failed,
    FromScheduler,
    FromTokenizer,
    Generate,
    Hello,
    QueueState,
    Rejected,
    Started,
    StepOutput,
    Stop,
    Submit,
    TextPrompt,
    TokenSegment,
    TokensPrompt,
    ToTokenizer,
)
from core.model_info import ModelInfo
from core.process import Process, freeze_heap
from core.stats import TokenizerSnapshot
from core.text_codec import TextCodec

log = logging.getLogger("quire.tokenizer")

LONG_TEXT = 16_384  # characters; some 3 ms to encode
NUM_ENCODERS = 2  # threads: one text of many megabytes does not hold up all other long ones
MAX_POLL_S = 0.5
TURN_S = 0.005  # after so long with news from one side, the other side has its turn
CHECK_S = 5.0  # for a grammar: twenty times what the costliest takes that is within the limits of core/grammar.py

T = TypeVar("T")


class Requests:
    """What is under way, by id; and how a Generate becomes a Submit."""

    def __init__(self, model: ModelInfo, codec: TextCodec, template: ChatTemplate | None) -> None:
        self.model = model
        self.codec = codec
        self.template = template
        self.grammars = GrammarCheck(model, codec)
        self.live: dict[str, LiveText] = {}
        self.snapshot = TokenizerSnapshot()

    def text_of(self, generate: Generate) -> tuple[str, bool] | None:
        """The text to encode and whether to add special tokens; None for a prompt of token ids.

        Raises QuireError when the chat template refuses the messages.
        """
        match generate.prompt:
            case TextPrompt(text):
                return text, True
            case ChatPrompt() as chat:
                if self.template is None:
                    text = f"{self.model.name} has no chat template; use /v1/completions"
                    raise QuireError("unsupported", text, "messages")
                extra = json.loads(chat.template_kwargs) if chat.template_kwargs else None
                rendered = self.template.render(
                    json.loads(chat.messages),
                    json.loads(chat.tools) if chat.tools else None,
                    chat.add_generation_prompt,
                    chat.continue_final_message,
                    extra,
                )
                return rendered, False
            case TokensPrompt():
                return None

    def begin(self, peer: str, generate: Generate, prompt_ids: list[int]) -> tuple[Started, Submit]:
        """Check the tokenized prompt and take the request up. Raises QuireError."""
        self._check(prompt_ids, generate, _field(generate))
        room = self.model.max_model_len - len(prompt_ids)
        sampling = generate.sampling
        if sampling.max_tokens is None:
            sampling = msgspec.structs.replace(sampling, max_tokens=room)
        self.live[generate.request_id] = LiveText(peer, generate, prompt_ids, self.codec)
        self.snapshot.encoded_tokens += len(prompt_ids)
        submit = Submit(
            generate.request_id,
            generate.engine,
            [TokenSegment(prompt_ids)],
            sampling,
            # Where a grammar leaves nothing but the end, the end comes, whatever is wanted besides.
            [] if sampling.ignore_eos and sampling.structured_outputs is None else self.model.eos_ids,
            generate.priority,
            ["salt", generate.cache_salt] if generate.cache_salt else [],
            generate.arrival_s,
            generate.deadline_s,
            0,
            generate.epoch,
            generate.resume,
            generate.tenant,
            generate.user,
        )
        started = Started(generate.request_id, len(prompt_ids))
        if generate.want_prompt:
            text = (
                generate.prompt.text
                if isinstance(generate.prompt, TextPrompt)
                else self.codec.decode(prompt_ids, False)
            )
            started = Started(generate.request_id, len(prompt_ids), prompt_ids, text)
        return started, submit

    def _check(self, prompt_ids: list[int], generate: Generate, field: str) -> None:
        limit = self.model.max_model_len
        if not prompt_ids:
            raise QuireError("invalid_value", f"{field}: the prompt is empty; give at least one token", field)
        least, most = min(prompt_ids), max(prompt_ids)
        if least < 0 or most >= self.model.vocab_size:
            wrong = least if least < 0 else most
            text = f"{field}: token id {wrong} is not in the vocabulary of {self.model.vocab_size} tokens"
            raise QuireError("invalid_value", text, field)
        wanted = generate.sampling.max_tokens
        if len(prompt_ids) >= limit or (wanted is not None and len(prompt_ids) + wanted > limit):
            raise self._too_long(f"{len(prompt_ids)}", generate, field)

    def check_text(self, text: str, generate: Generate) -> None:
        """Refuse a text that cannot fit, however well it is encoded, without encoding it. Raises QuireError."""
        fewest = self.codec.fewest_tokens(text)
        if fewest >= self.model.max_model_len:
            raise self._too_long(f"at least {fewest}", generate, _field(generate))

    def _too_long(self, tokens: str, generate: Generate, field: str) -> QuireError:
        wanted = generate.sampling.max_tokens
        asked = f" and max_tokens asks for {wanted} more" if wanted is not None else ""
        takes = f"{self.model.name} takes {self.model.max_model_len} in all"
        text = f"{field}: the prompt has {tokens} tokens{asked}; {takes}; shorten the prompt or lower max_tokens"
        return QuireError("context_length_exceeded", text, field)


def _field(generate: Generate) -> str:
    """What errors call the prompt."""
    return "messages" if isinstance(generate.prompt, ChatPrompt) else "prompt"


class Unsubmitted:
    """The ids of the requests that the scheduler does not have yet."""

    def __init__(self, *places: Known) -> None:
        self._places = places

    def __contains__(self, request_id: object) -> bool:
        return any(request_id in place for place in self._places)

    def __len__(self) -> int:
        return sum(map(len, self._places))


class TokenizerProcess:
    """The loop: receive, encode, hand down; receive, decode, hand up."""

    def __init__(self, process: Process, requests: Requests, apis: Server[Any], scheduler: Client[Any]) -> None:
        self.process = process
        self.requests = requests
        self.apis = apis
        self.scheduler = scheduler
        self.encoders = ThreadPoolExecutor(NUM_ENCODERS, "encode")
        self.checker = ThreadPoolExecutor(1, "grammar")
        self.arrivals = Arrivals()
        self.long = Arrivals()  # what waits for an encoder
        self.num_encoding = 0  # encoders at work, also for requests that are gone
        self.aside: dict[str, tuple[str, Future[Any]]] = {}  # id -> peer, and what a thread does for the request
        self.checks: deque[tuple[float, str, str, Future[None]]] = deque()  # (time limit, peer, request, its check)
        self.deadlines = Deadlines(Unsubmitted(self.arrivals, self.long, self.aside))
        self.queue_state = QueueState(0, 0, 0)
        self.peers: set[str] = set()
        self.unsent: list[Stop | Abort] = []  # what a scheduler that does not read must still be told
        self.done: deque[Callable[[], None]] = deque()
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)

    def run(self) -> None:
        """Until the supervisor asks for the end."""
        poller = zmq.Poller()
        for socket in (self.apis.socket, self.scheduler.socket, self.process.control.socket, self.wake):
            poller.register(socket, zmq.POLLIN)
        while not self.process.stopping:
            poller.poll(0 if self.arrivals else 1 + int(1000 * self.deadlines.wait_s(time.monotonic(), MAX_POLL_S)))
            self.hand_up()
            self.hand_down()
            if self.checks:
                self.give_up_checks()
            self.expire()
            if self.unsent:
                self.tell([])
            self.process.poll_control()
            if self.process.control.due():
                self.requests.snapshot.live = len(self.requests.live)
                self.requests.snapshot.queued = len(self.arrivals) + len(self.long) + len(self.aside)
                self.process.beat(self.requests.snapshot)
        self.encoders.shutdown(wait=False, cancel_futures=True)
        self.checker.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------ down

    def hand_down(self) -> None:
        """Take what the api processes have sent, encode what waits, and take what threads are done with."""
        end_s = time.monotonic() + TURN_S
        while time.monotonic() < end_s and (frame := self.apis.receive(0)) is not None:
            peer, messages = frame
            if peer not in self.peers:
                self.peers.add(peer)
                self.send(peer, [self.queue_state])
            for message in messages:
                match message:
                    case Generate():
                        self.arrive(peer, message)
                    case Abort(request_id):
                        self.abort(request_id)
        end_s = time.monotonic() + TURN_S
        while (arrival := self.arrivals.take()) is not None:
            self.generate(arrival.peer, arrival.generate)
            if time.monotonic() >= end_s:
                break
        # First the mark, then the work: what a thread adds in between wakes the loop once more.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake)
        while self.done:
            self.done.popleft()()

    def arrive(self, peer: str, generate: Generate) -> None:
        """Let a request wait for its turn."""
        request_id = generate.request_id
        if (live := self.requests.live.get(request_id)) is not None and generate.epoch <= live.epoch:
            return  # late words of the request's earlier life
        self.abort(request_id)  # it comes back from the journal: the earlier life is over
        self.arrivals.add(Arrival(peer, generate))
        self.deadlines.add(request_id, generate.deadline_s)

    def generate(self, peer: str, generate: Generate) -> None:
        """Take a request up; a grammar that is not known is checked first."""
        request_id = generate.request_id
        if generate.deadline_s is not None and generate.deadline_s <= time.monotonic():
            self.too_late(peer, request_id)
            return
        with self.alone(peer, generate):
            asked = self.requests.text_of(generate)
            if asked is not None:
                self.requests.check_text(asked[0], generate)
            wanted, grammars = generate.sampling.structured_outputs, self.requests.grammars
            if wanted is None or grammars.known(wanted):
                self.encode(peer, generate, asked)
                return
            future = self.checker.submit(grammars.check, wanted)
            self.checks.append((time.monotonic() + CHECK_S, peer, request_id, future))
            self.when_done(peer, generate, future, lambda _: self.encode(peer, generate, asked))

    @contextlib.contextmanager
    def alone(self, peer: str, generate: Generate) -> Iterator[None]:
        """Whatever goes wrong inside is the end of this one request, and of nothing else."""
        try:
            yield
        except QuireError as error:
            param = _field(generate) if error.param == "prompt" else error.param
            self.reject(peer, generate.request_id, QuireError(error.code, error.message, param, error.retry_after_s))
        except Exception:
            log.exception("%s could not be tokenized", generate.request_id)
            self.reject(peer, generate.request_id, QuireError("internal_error", "the prompt could not be tokenized"))

    def encode(self, peer: str, generate: Generate, asked: tuple[str, bool] | None) -> None:
        """Encode a request's prompt here, or in a thread when it is long, and submit it."""
        if asked is None:
            assert isinstance(generate.prompt, TokensPrompt)
            self.submit(peer, generate, generate.prompt.ids)
        elif len(asked[0]) < LONG_TEXT:
            self.submit(peer, generate, self.requests.codec.encode(*asked))
        else:
            self.long.add(Arrival(peer, generate, *asked))
            self.feed()

    def feed(self) -> None:
        """Keep the encoders at work on long texts."""
        while self.num_encoding < NUM_ENCODERS and (arrival := self.long.take()) is not None:
            assert arrival.text is not None
            self.num_encoding += 1
            future = self.encoders.submit(self.requests.codec.encode, arrival.text, arrival.special_tokens)
            self.when_done(arrival.peer, arrival.generate, future, partial(self.submit, arrival.peer, arrival.generate))
            future.add_done_callback(lambda _: self.soon(self.encoder_is_free))

    def encoder_is_free(self) -> None:
        """An encoder is done, or never began."""
        self.num_encoding -= 1
        self.feed()

    def soon(self, action: Callable[[], None]) -> None:
        """Let the loop do something; called by threads."""
        self.done.append(action)
        os.eventfd_write(self.wake, 1)

    def when_done(self, peer: str, generate: Generate, future: Future[T], then: Callable[[T], None]) -> None:
        """The loop goes on, and calls `then` with what the thread gives, unless the request is aborted meanwhile."""

        def go_on() -> None:
            if not self.awaits(generate.request_id, future):
                return
            del self.aside[generate.request_id]
            with self.alone(peer, generate):
                then(future.result())

        def finished(future: Future[T]) -> None:
            if not future.cancelled():
                self.soon(go_on)

        self.aside[generate.request_id] = (peer, future)
        future.add_done_callback(finished)

    def awaits(self, request_id: str, future: Future[Any]) -> bool:
        """Whether a request still waits for what a thread does."""
        return request_id in self.aside and self.aside[request_id][1] is future

    def give_up_checks(self) -> None:
        """Refuse what has taken too long to check: counts of work bound the library, and this what they might miss."""
        while self.checks and (self.checks[0][3].done() or self.checks[0][0] <= time.monotonic()):
            _, peer, request_id, future = self.checks.popleft()
            if not self.awaits(request_id, future) or future.done():
                continue  # aborted, or on its way
            del self.aside[request_id]
            if future.cancel():  # it has not begun
                self.reject(peer, request_id, QuireError("queue_full", "too many grammars are new", None, 1.0))
            else:
                text = f"the grammar could not be checked within {CHECK_S:g} s; make it simpler"
                self.reject(peer, request_id, QuireError("invalid_grammar", text, "structured_outputs"))

    def submit(self, peer: str, generate: Generate, ids: list[int]) -> None:
        """Tell the client that it began, and the scheduler to begin."""
        started, submit = self.requests.begin(peer, generate, ids)
        try:
            self.scheduler.send([*self.unsent, submit])
            self.unsent = []
        except ChannelFull:
            del self.requests.live[generate.request_id]
            raise QuireError("queue_full", "the scheduler does not take requests now", None, 1.0) from None
        self.send(peer, [started])

    def reject(self, peer: str, request_id: str, error: QuireError) -> None:
        """An ending before the beginning."""
        self.send(peer, [Rejected(request_id, error.code, error.message, error.param, error.retry_after_s)])

    def abort(self, request_id: str) -> None:
        """The client went away."""
        self.forget(request_id)
        if self.requests.live.pop(request_id, None) is not None:
            self.tell([Abort(request_id)])

    def forget(self, request_id: str) -> str | None:
        """Drop a request that is not tokenized yet; returns the api process that sent it."""
        if (arrival := self.arrivals.discard(request_id) or self.long.discard(request_id)) is not None:
            return arrival.peer
        peer, future = self.aside.pop(request_id, (None, None))
        if future is not None:
            future.cancel()
        return peer

    def expire(self) -> None:
        """End requests whose deadline passed before they were tokenized; after that the scheduler does."""
        for request_id in self.deadlines.expired(time.monotonic()):
            if (peer := self.forget(request_id)) is not None:
                self.too_late(peer, request_id)

    def too_late(self, peer: str, request_id: str) -> None:
        """The ending of a request whose deadline has passed."""
        self.requests.snapshot.expired += 1
        text = "the request's deadline passed before its prompt was tokenized"
        self.send(peer, [Failed(request_id, "deadline_exceeded", text)])

    def tell(self, messages: Sequence[Stop | Abort]) -> None:
        """Send to the scheduler what may not be lost; while it does not read, it is kept."""
        self.unsent += messages
        try:
            self.scheduler.send(self.unsent)
        except ChannelFull:
            return
        self.unsent = []

    # ------------------------------------------------------------------------------------------ up

    def hand_up(self) -> None:
        """Take what the scheduler has sent; each api process gets one frame per frame taken."""
        end_s = time.monotonic() + TURN_S
        while time.monotonic() < end_s and (frame := self.scheduler.receive(0)) is not None:
            news: dict[str, list[FromTokenizer]] = {}
            stops: list[Stop] = []
            for message in frame:
                match message:
                    case StepOutput():
                        self.decode(message, news, stops)
                    case Rejected() | Failed():
                        live = self.requests.live.pop(message.request_id, None)
                        if live is not None:
                            news.setdefault(live.peer, []).append(message)
                    case QueueState():
                        self.queue_state = message
                        for peer in list(self.peers):
                            news.setdefault(peer, []).append(message)
            if stops:
                self.tell(stops)
            for peer, messages in news.items():
                self.send(peer, messages)

    def decode(self, step: StepOutput, news: dict[str, list[FromTokenizer]], stops: list[Stop]) -> None:
        """A step's tokens to text."""
        requests = self.requests.live
        decoded = 0
        for request_id, queued_s in step.queued_s.items():
            if (begun := requests.get(request_id)) is not None:
                begun.queued_s = begun.queued_s or queued_s
        for output in step.outputs:
            live = requests.get(output.request_id)
            if live is None:
                continue  # aborted; the scheduler knows by now
            decoded += len(output.token_ids)
            try:
                delta, stopped = live.take(output)
            except Exception:
                log.exception("%s could not be decoded", output.request_id)
                text = "the output of this request could not be decoded"
                news.setdefault(live.peer, []).append(Failed(output.request_id, "internal_error", text))
                self.abort(output.request_id)
                continue
            if delta is None:
                continue
            if stopped:
                stops.append(Stop(output.request_id, output.choice))
            mine = news.setdefault(live.peer, [])
            mine.append(delta)
            if live.num_open == 0:
                mine.append(live.finished())
                self.requests.snapshot.stop_hits += live.stop_hits
                del requests[output.request_id]
        self.requests.snapshot.decoded_tokens += decoded

    def send(self, peer: str, messages: list[FromTokenizer]) -> None:
        """Hand news to an api process; one that is gone, or does not read, has its requests aborted."""
        try:
            self.apis.send(peer, messages)
        except (PeerGone, ChannelFull):
            self.peers.discard(peer)
            for request_id in self.arrivals.sent_by(peer) + self.long.sent_by(peer):
                self.forget(request_id)
            for request_id in [key for key, live in self.requests.live.items() if live.peer == peer]:
                self.abort(request_id)


def main() -> None:
    """Entry point of a tokenizer process."""
    began = time.monotonic()
    process = Process.start("tokenizer")
    logging.basicConfig(level=process.config.log_level.upper())
    folder = Path(process.model.path)
    requests = Requests(process.model, TextCodec(folder), ChatTemplate.load(folder))
    context: zmq.Context[Any] = zmq.Context()
    apis: Server[Any] = Server(context, process.address(process.name), ToTokenizer)
    scheduler: Client[Any] = Client(context, process.address("scheduler"), FromScheduler, name=process.name)
    scheduler.send([Hello(process.name)])
    process.ready(f"{requests.codec.num_ids:,} tokens", {"load": time.monotonic() - began})
    freeze_heap()
    try:
        TokenizerProcess(process, requests, apis, scheduler).run()
    finally:
        apis.close()
        scheduler.close()
        context.term()
        process.finish()


if __name__ == "__main__":
    main()
