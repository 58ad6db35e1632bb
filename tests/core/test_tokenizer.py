"""The tokenizer process, started as the supervisor starts it, with fakes of its neighbours around it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil
import pytest
import zmq

from core.channel import Client, Server
from core.config import Config
from core.messages import (
    Abort,
    ChatPrompt,
    ChoiceProgress,
    Delta,
    Failed,
    Finished,
    FromTokenizer,
    Generate,
    Heartbeat,
    Hello,
    Prompt,
    QueueState,
    Ready,
    Rejected,
    SequenceOutput,
    Shutdown,
    Started,
    StepOutput,
    Stop,
    Submit,
    TextPrompt,
    TokenLogprobs,
    TokensPrompt,
    ToScheduler,
    ToSupervisor,
)
from core.model_info import resolve
from core.stats import TokenizerSnapshot, decode
from core.text_codec import TextCodec
from core.tokenizer import LONG_TEXT
from quire import SamplingParams, StructuredOutputs

MODEL = resolve("tiny-chat")
EOS = 3
WAIT_S = 20.0
T = TypeVar("T")


class Api:
    """An api process: one connection to the tokenizer."""

    def __init__(self, folder: Path, name: str) -> None:
        self.client: Client[Any] = Client(
            zmq.Context.instance(), f"ipc://{folder}/tokenizer-0", FromTokenizer, name=name
        )
        self.frames: list[list[Any]] = []
        self.unread: list[Any] = []
        self.states: list[QueueState] = []

    def send(self, *messages: Any) -> None:
        self.client.send(list(messages))

    def take(self, kind: type[T], request_id: str | None = None) -> T:
        """The next message, which must be of this kind (and of this request)."""
        while not self.unread:
            frame = self.client.receive(WAIT_S)
            assert frame is not None, f"no {kind.__name__}"
            self.states += [message for message in frame if isinstance(message, QueueState)]
            if frame != [*self.states[-1:]]:
                self.frames.append(frame)
            self.unread += [message for message in frame if not isinstance(message, QueueState)]
        message = self.unread.pop(0)
        assert isinstance(message, kind), message
        assert request_id in (None, message.request_id)  # type: ignore[attr-defined]
        return message

    def quiet(self) -> bool:
        """Whether nothing has come that was not taken."""
        return not self.unread and all(isinstance(message, QueueState) for message in self.client.receive(0.1) or [])


class Around:
    """What stands around the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "config.json").write_bytes(Config().to_json())
        (folder / "model.json").write_bytes(msgspec.json.encode(MODEL))
        context: zmq.Context[Any] = zmq.Context.instance()
        self.supervisor: Server[Any] = Server(context, f"ipc://{folder}/control", ToSupervisor)
        self.scheduler: Server[Any] = Server(context, f"ipc://{folder}/scheduler", ToScheduler)
        self.submitted: list[Any] = []
        command = [sys.executable, "-P", "-m", "core.tokenizer", "--run-dir", str(folder), "--name", "tokenizer-0"]
        self.process = subprocess.Popen([*command, "--parent", str(os.getpid())])
        self.apis: dict[str, Api] = {}
        frame = self.supervisor.receive(WAIT_S)
        assert frame is not None
        self.ready = frame[1][0]

    def api(self, name: str = "api-0") -> Api:
        if name not in self.apis:
            self.apis[name] = Api(self.folder, name)
        return self.apis[name]

    def told(self, kind: type[T]) -> T:
        """The next message to the scheduler, which must be of this kind."""
        while not self.submitted:
            frame = self.scheduler.receive(WAIT_S)
            assert frame is not None, f"no {kind.__name__}"
            assert frame[0] == "tokenizer-0"
            self.submitted += frame[1]
        message = self.submitted.pop(0)
        assert isinstance(message, kind), message
        return message

    def step(self, *outputs: SequenceOutput) -> None:
        self.scheduler.send("tokenizer-0", [StepOutput(MODEL.engine, 1, list(outputs))])

    def begin(self, request_id: str, sampling: SamplingParams, api: str = "api-0", text: str = "hi") -> Submit:
        """Send a request and see it begin."""
        self.api(api).send(generate(request_id, TextPrompt(text), sampling))
        self.api(api).take(Started, request_id)
        return self.told(Submit)

    def snapshot(self) -> TokenizerSnapshot:
        """What the next heartbeat carries."""
        while (frame := self.supervisor.receive(0)) is not None:
            pass
        frame = self.supervisor.receive(WAIT_S)
        assert frame is not None
        assert isinstance(frame[1][0], Heartbeat)
        found = decode(frame[1][0].snapshot)
        assert isinstance(found, TokenizerSnapshot)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        sockets = [self.supervisor.socket, self.scheduler.socket, *(api.client.socket for api in self.apis.values())]
        for socket in sockets:
            socket.close(0)


def generate(request_id: str, prompt: Prompt, sampling: SamplingParams | None = None, **more: Any) -> Generate:
    return Generate(request_id, MODEL.engine, prompt, sampling or SamplingParams(seed=1), **more)


def out(request_id: str, ids: list[int], first: int = 0, reason: str | None = None, **more: Any) -> SequenceOutput:
    more.setdefault("choice", 0)
    return SequenceOutput(request_id, first=first, token_ids=ids, finish_reason=reason, **more)


@pytest.fixture(scope="module")
def around() -> Iterator[Around]:
    with tempfile.TemporaryDirectory(prefix="quire-") as folder:
        found = Around(Path(folder))
        assert found.told(Hello) == Hello("tokenizer-0")
        yield found
        found.close()


@pytest.fixture(autouse=True)
def nothing_left(around: Around) -> Iterator[None]:
    """Every test reads all that the process has to say, and leaves it alive."""
    yield
    assert around.process.poll() is None
    assert not around.submitted
    assert around.scheduler.receive(0) is None
    assert all(api.quiet() for api in around.apis.values())


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(Path(MODEL.path))


def test_it_starts_without_torch_or_transformers(around: Around) -> None:
    assert isinstance(around.ready, Ready)
    assert (around.ready.process, around.ready.pid) == ("tokenizer-0", around.process.pid)
    assert around.ready.phases["load"] > 0
    process = psutil.Process(around.process.pid)
    assert not any("torch" in region.path for region in process.memory_maps())
    assert process.memory_info().rss < 150e6


def test_a_text_goes_down_and_comes_back(around: Around, codec: TextCodec) -> None:
    api = around.api()
    salted = generate(
        "r",
        TextPrompt("Hello world"),
        SamplingParams(seed=7),
        cache_salt="s",
        priority=2,
        deadline_s=1e9,
        tenant="key",
        user="ada",
    )
    api.send(salted)
    ids = codec.encode("Hello world", True)
    assert api.take(Started, "r") == Started("r", len(ids))
    submit = around.told(Submit)
    assert [segment.ids for segment in submit.segments] == [ids]
    assert submit.sampling.max_tokens == MODEL.max_model_len - len(ids)
    assert (submit.sampling.seed, submit.eos_ids, submit.cache_keys) == (7, MODEL.eos_ids, ["salt", "s"])
    assert (submit.engine, submit.priority, submit.deadline_s) == (MODEL.engine, 2, 1e9)
    assert (submit.tenant, submit.user) == ("key", "ada")
    answer = codec.encode("grüße 日本", False)
    text = ""
    for i, token in enumerate(answer):
        around.step(out("r", [token], i, cached_tokens=1 if i == 0 else 0))
        delta = api.take(Delta, "r")
        assert (delta.first, delta.token_ids, delta.finish_reason) == (i, [token], None)
        text += delta.text
    assert text == "grüße 日本"
    around.step(out("r", [EOS], len(answer), "stop"))
    end = api.take(Delta, "r")
    assert (end.text, end.finish_reason, end.stop_reason) == ("", "stop", None)
    assert api.take(Finished, "r") == Finished("r", len(ids), len(answer) + 1, 1)
    around.step(out("r", [5], len(answer) + 1))  # too late: nobody hears of it


def test_a_chat_is_rendered(around: Around, codec: TextCodec) -> None:
    messages = json.dumps([{"role": "user", "content": "Hi"}]).encode()
    around.api().send(
        generate("c", ChatPrompt(messages), SamplingParams(max_tokens=3, ignore_eos=True), want_prompt=True)
    )
    started = around.api().take(Started, "c")
    submit = around.told(Submit)
    assert started.prompt_text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert codec.encode(started.prompt_text, False) == started.prompt_ids == submit.segments[0].ids
    assert (submit.sampling.max_tokens, submit.eos_ids) == (3, [])
    around.step(out("c", [EOS, 100, 101], 0, "length"))  # end-of-sequence ignored, and a special token: not shown
    assert around.api().take(Delta).text == codec.decode([100, 101], True)
    assert around.api().take(Finished).completion_tokens == 3


def test_a_grammar_is_checked_before_the_scheduler_hears_of_it(around: Around) -> None:
    for _ in range(2):  # the second time it is known
        wanted = SamplingParams(seed=1, ignore_eos=True, structured_outputs=StructuredOutputs(regex="[a-c]+"))
        submit = around.begin("g", wanted)
        assert submit.sampling.structured_outputs == wanted.structured_outputs
        assert submit.eos_ids == MODEL.eos_ids  # the grammar may leave nothing else
        around.api().send(Abort("g"))
        assert around.told(Abort) == Abort("g")


def test_a_bad_grammar_ends_alone(around: Around) -> None:
    bad = StructuredOutputs(json='{"type": 1}', source="response_format")
    around.api().send(
        generate("bad", TextPrompt("x"), SamplingParams(seed=1, structured_outputs=bad)),
        generate("gone", TextPrompt("x"), SamplingParams(seed=1, structured_outputs=StructuredOutputs(regex="zz*"))),
        Abort("gone"),
        generate("good", TextPrompt("x")),
    )
    endings: dict[str, Any] = {}
    while len(endings) < 2:
        frame = around.api().client.receive(WAIT_S)
        assert frame is not None
        endings |= {message.request_id: message for message in frame}
    assert isinstance(endings["good"], Started)
    refused = endings["bad"]
    assert isinstance(refused, Rejected)
    assert (refused.code, refused.param) == ("invalid_grammar", "response_format")
    assert refused.message.startswith("response_format: ")
    assert around.told(Submit).request_id == "good"
    around.api().send(Abort("good"))
    assert around.told(Abort) == Abort("good")


@pytest.mark.parametrize(
    ("prompt", "sampling", "code", "words"),
    [
        (TextPrompt("a b c"), SamplingParams(max_tokens=5000), "context_length_exceeded", r"[34] tokens.*5000.*2048"),
        (TokensPrompt([5] * 2048), SamplingParams(), "context_length_exceeded", "2048 tokens; tiny-chat takes 2048"),
        (TextPrompt("word " * 3000), SamplingParams(), "context_length_exceeded", "tokens"),
        (TextPrompt("x" * 10**7), SamplingParams(max_tokens=5), "context_length_exceeded", "at least .* 5 more"),
        (TokensPrompt([]), SamplingParams(), "invalid_value", "empty"),
        (TokensPrompt([5, 4096]), SamplingParams(), "invalid_value", "4096 is not in the vocabulary of 4096"),
        (TokensPrompt([5, -1]), SamplingParams(), "invalid_value", "-1 is not in the vocabulary"),
        (ChatPrompt(b'[{"role":"user","content":"\\ud800"}]'), SamplingParams(), "invalid_value", "surrogate"),
        (ChatPrompt(b'[{"role":"user","content":{"a":1}}]'), SamplingParams(), "", ""),
        (ChatPrompt(b"[1, 2]"), SamplingParams(), "", ""),
        (ChatPrompt(b"[]", continue_final_message=True), SamplingParams(), "template_error", "no text"),
        (ChatPrompt(b"{not json"), SamplingParams(), "internal_error", "could not be tokenized"),
    ],
)  # fmt: skip
def test_a_bad_request_ends_alone(
    around: Around, prompt: Prompt, sampling: SamplingParams, code: str, words: str
) -> None:
    around.api().send(generate("bad", prompt, sampling))
    frame = around.api().client.receive(WAIT_S)
    assert frame is not None
    (message,) = frame
    if not code:  # whether the template takes it is the template's affair: it must only be one clear answer
        if isinstance(message, Started):
            around.told(Submit)
            around.api().send(Abort("bad"))
            around.told(Abort)
        else:
            assert isinstance(message, Rejected)
            assert message.code == "template_error"
        return
    assert isinstance(message, Rejected), message
    assert message.code == code
    if code != "internal_error":
        names = ("messages", "continue_final_message") if isinstance(prompt, ChatPrompt) else ("prompt",)
        assert message.param in names
    assert re.search(words, message.message), message.message


def test_a_stop_string_ends_the_choice_at_both_sides(around: Around, codec: TextCodec) -> None:
    around.begin("s", SamplingParams(stop=("END",), n=2))
    api = around.api()
    ids = codec.encode("one EN", False)
    around.step(out("s", ids))
    assert api.take(Delta).text == "one "
    more = codec.encode("D two", False)
    around.step(out("s", more[:1], len(ids)))
    end = api.take(Delta)
    assert (end.text, end.finish_reason, end.stop_reason) == ("", "stop", "END")
    assert around.told(Stop) == Stop("s", 0)
    around.step(out("s", more[1:], len(ids) + 1), out("s", [EOS], 0, "stop", choice=1))  # the first was too late
    assert api.take(Delta).choice == 1
    assert api.take(Finished).completion_tokens == len(ids) + 2


def test_a_step_is_one_frame_for_each_api_process(around: Around, codec: TextCodec) -> None:
    names = {"a": "api-0", "b": "api-1", "c": "api-0"}
    for request_id, name in names.items():
        around.begin(request_id, SamplingParams(), name)
    before = {name: len(around.api(name).frames) for name in ("api-0", "api-1")}
    (word,) = codec.encode(" the", False)
    around.step(*(out(request_id, [word]) for request_id in names))
    assert [around.api("api-0").take(Delta).request_id for _ in range(2)] == ["a", "c"]
    assert around.api("api-1").take(Delta, "b").text == " the"
    assert [len(around.api(name).frames) - before[name] for name in ("api-0", "api-1")] == [1, 1]
    around.step(*(out(request_id, [EOS], 1, "stop") for request_id in names))
    for request_id, name in names.items():
        around.api(name).take(Delta, request_id)
        around.api(name).take(Finished, request_id)


def test_an_ending_of_the_scheduler_is_the_ending(around: Around) -> None:
    around.begin("x", SamplingParams())
    around.begin("y", SamplingParams())
    around.scheduler.send(
        "tokenizer-0", [Rejected("x", "queue_full", "later", None, 1.0), Failed("y", "worker_failed", "gone")]
    )
    assert around.api().take(Rejected) == Rejected("x", "queue_full", "later", None, 1.0)
    assert around.api().take(Failed) == Failed("y", "worker_failed", "gone")
    around.step(out("x", [5]), out("y", [5]))
    around.scheduler.send("tokenizer-0", [Failed("x", "worker_failed", "twice")])


def test_an_abort_frees_at_once_and_answers_nothing(around: Around) -> None:
    around.begin("gone", SamplingParams())
    around.api().send(Abort("gone"), Abort("never heard of"))
    assert around.told(Abort) == Abort("gone")
    around.step(out("gone", [5], 0, "stop"))


def test_an_api_process_that_vanishes_has_its_requests_aborted(around: Around) -> None:
    for request_id in ("v1", "v2"):
        around.begin(request_id, SamplingParams(), "api-9")
    around.apis.pop("api-9").client.socket.close(0)
    deadline = time.monotonic() + WAIT_S
    aborted: set[str] = set()
    first = 0
    while len(aborted) < 2 and time.monotonic() < deadline:
        around.step(out("v1", [5], first))
        first += 1
        frame = around.scheduler.receive(0.1)
        for message in frame[1] if frame is not None else []:
            assert isinstance(message, Abort)
            aborted.add(message.request_id)
    assert aborted == {"v1", "v2"}


def test_long_texts_do_not_hold_up_a_stream(around: Around, codec: TextCodec) -> None:
    around.begin("stream", SamplingParams())
    api, other = around.api(), around.api("api-1")
    text = "a b c d " * 12_000  # as short as the model's limit might be, for all that is known before it is encoded
    assert len(text) > LONG_TEXT
    assert codec.fewest_tokens(text) < MODEL.max_model_len
    for i in range(10):
        other.send(generate(f"long{i}", TextPrompt(text)))
    around.step(out("stream", [100]))
    api.take(Delta, "stream")
    answered = 0
    while (frame := other.client.receive(0)) is not None:
        answered += sum(isinstance(message, Rejected) for message in frame)
    assert answered < 10  # the stream did not wait for them
    for _ in range(10 - answered):
        assert other.take(Rejected).code == "context_length_exceeded"
    api.send(Abort("stream"))
    assert around.told(Abort).request_id == "stream"


def test_a_flood_of_one_tenant_is_tokenized_between_the_others_prompts(around: Around) -> None:
    text = "a b c d " * 250  # some of it waits whenever the other's prompt comes
    flood = [generate(f"flood{i}", TextPrompt(text), tenant="noisy") for i in range(400)]
    around.api().send(*flood)
    around.api().send(generate("other", TextPrompt("hi"), tenant="quiet"))
    order = [around.told(Submit).request_id for _ in range(401)]
    assert set(order) == {"other", *(item.request_id for item in flood)}
    assert order.index("other") < 300
    assert [name for name in order if name != "other"] == [item.request_id for item in flood]
    for name in order:
        around.api().take(Started)
        around.api().send(Abort(name))
        around.told(Abort)


def test_a_deadline_that_passes_before_the_prompt_is_tokenized(around: Around) -> None:
    before = around.snapshot().expired
    around.api().send(generate("late", TextPrompt("hi"), deadline_s=time.monotonic() - 1))
    assert around.api().take(Failed, "late").code == "deadline_exceeded"
    text = "a b c d " * 12_000
    assert len(text) > LONG_TEXT
    soon = time.monotonic() + 0.01
    around.api().send(*(generate(f"behind{i}", TextPrompt(text), deadline_s=soon) for i in range(30)))
    endings = [around.api().take(Rejected | Failed).code for _ in range(30)]  # type: ignore[arg-type]
    assert set(endings) <= {"deadline_exceeded", "context_length_exceeded"}
    assert endings.count("deadline_exceeded") >= 10
    assert around.snapshot().expired == before + 1 + endings.count("deadline_exceeded")


def test_how_full_the_house_is_reaches_every_api_process(around: Around) -> None:
    for name in ("api-0", "api-2"):
        around.api(name).send(generate("x", TokensPrompt([-1])))
        around.api(name).take(Rejected)
    assert around.api("api-2").states == [QueueState(0, 0, 0)]  # it was new
    state = QueueState(5, 600, 7, 3)
    around.scheduler.send("tokenizer-0", [state])
    for name in ("api-0", "api-2"):
        around.api(name).send(generate("x", TokensPrompt([-1])))
        around.api(name).take(Rejected)
        assert around.api(name).states[-1] == state


def test_a_long_text_that_fits(around: Around, codec: TextCodec) -> None:
    text = " " * (LONG_TEXT + 1)
    submit = around.begin("long", SamplingParams(), text=text)
    assert submit.segments[0].ids == codec.encode(text, True)
    around.api().send(Abort("long"))
    around.told(Abort)


def test_aborted_while_it_is_encoded(around: Around) -> None:
    around.api().send(generate("early", TextPrompt("a b c d " * 4000)), Abort("early"))
    time.sleep(0.3)  # nothing_left looks for answers that must not come


def test_resuming_goes_on_where_the_client_is(around: Around, codec: TextCodec) -> None:
    ids = codec.encode("good 日本 morning", False)
    cut = 3
    shown = TextPrompt("hi")
    progress = [ChoiceProgress(0, ids[:cut])]
    around.begin("again", SamplingParams(stop=("morning!",)))
    around.step(out("again", ids[:cut]))
    text = around.api().take(Delta).text
    around.api().send(generate("again", shown, SamplingParams(stop=("morning!",)), epoch=1, resume=progress))
    around.api().take(Started)
    assert around.told(Abort) == Abort("again")  # the earlier life, which this scheduler may still run
    submit = around.told(Submit)
    assert (submit.epoch, submit.resume) == (1, progress)
    around.step(out("again", [99], cut))  # of the life before: dropped
    around.step(out("again", ids[cut:], cut, "length", epoch=1))
    rest = around.api().take(Delta)
    assert (rest.first, rest.epoch) == (cut, 1)
    assert text + rest.text == "good 日本 morning"
    assert around.api().take(Finished).completion_tokens == len(ids)


def test_logprobs_of_prompt_and_output(around: Around, codec: TextCodec) -> None:
    submit = around.begin("lp", SamplingParams(logprobs=1, prompt_logprobs=0), text="a b")
    prompt = submit.segments[0].ids
    mark = TokenLogprobs(-0.5, 0, [7], [-0.5])
    around.step(out("lp", [100], prompt_logprobs=[mark] * (len(prompt) - 1), logprobs=[mark]))
    delta = around.api().take(Delta)
    assert [token and token.token_id for token in delta.prompt_logprobs] == [None, *prompt[1:]]
    assert delta.logprobs[0].raw == codec.token_bytes(100)
    assert delta.logprobs[0].top == [(7, *codec.token(7), -0.5)]
    around.step(out("lp", [EOS], 1, "stop", logprobs=[mark]))
    around.api().take(Delta)
    around.api().take(Finished)


def test_news_that_cannot_be_decoded_fail_one_request(around: Around) -> None:
    around.begin("odd", SamplingParams())
    around.begin("even", SamplingParams())
    around.step(out("odd", [5], choice=3), out("even", [100]))  # there is no such choice
    assert around.api().take(Failed).code == "internal_error"
    assert around.told(Abort) == Abort("odd")
    around.api().take(Delta, "even")
    around.api().send(Abort("even"))
    around.told(Abort)


def test_statistics_add_up(around: Around) -> None:
    before = around.snapshot()
    submit = around.begin("st", SamplingParams(stop=("x",)))
    assert around.snapshot().live == before.live + 1 == 1
    around.step(out("st", [100, 101]))
    around.api().take(Delta)
    around.step(out("st", [EOS], 2, "stop"))
    around.api().take(Delta)
    around.api().take(Finished)
    after = around.snapshot()
    assert after.live == 0
    assert after.encoded_tokens - before.encoded_tokens == len(submit.segments[0].ids)
    assert after.decoded_tokens - before.decoded_tokens == 3


def test_shutdown_is_orderly() -> None:
    with tempfile.TemporaryDirectory(prefix="quire-") as folder:
        second = Around(Path(folder))
        assert second.told(Hello) == Hello("tokenizer-0")
        try:
            second.begin("open", SamplingParams())
            second.supervisor.send("tokenizer-0", [Shutdown("end of the test")])
            assert second.process.wait(WAIT_S) == 0
        finally:
            second.close()
