"""A request on its way through the tokenizer: endings, usage, and what a stop string does."""

from __future__ import annotations

import pytest

from core.live_text import LiveText
from core.messages import ChoiceProgress, Generate, SequenceOutput, TextPrompt, TokenLogprobs
from core.model_info import BUILTIN
from core.text_codec import TextCodec
from quire import SamplingParams

EOS = 3


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(BUILTIN["tiny-chat"])


def live(codec: TextCodec, sampling: SamplingParams, resume: list[ChoiceProgress] | None = None) -> LiveText:
    generate = Generate("r", "e", TextPrompt("hi"), sampling, resume=resume or [])
    return LiveText("api-0", generate, codec.encode("hi", True), codec)


def output(
    ids: list[int], first: int = 0, reason: str | None = None, choice: int = 0, **extra: object
) -> SequenceOutput:
    return SequenceOutput("r", choice, first, ids, finish_reason=reason, **extra)  # type: ignore[arg-type]


def test_end_of_sequence_is_counted_but_not_shown(codec: TextCodec) -> None:
    request = live(codec, SamplingParams())
    ids = codec.encode("hello world", False)
    delta, stopped = request.take(output([*ids, EOS], reason="stop", cached_tokens=1))
    assert delta is not None
    assert (delta.text, delta.finish_reason, delta.stop_reason, stopped) == ("hello world", "stop", None, False)
    assert request.num_open == 0
    finished = request.finished()
    assert finished.completion_tokens == len(ids) + 1
    assert finished.cached_tokens == 1
    assert finished.prompt_tokens == len(codec.encode("hi", True))


def test_a_stop_token_is_not_text(codec: TextCodec) -> None:
    (word,) = codec.encode(" the", False)
    delta, _ = live(codec, SamplingParams()).take(output([word], reason="stop", stop_reason=word))
    assert delta is not None
    assert (delta.text, delta.stop_reason) == ("", word)
    included, _ = live(codec, SamplingParams(include_stop_str_in_output=True)).take(output([word], reason="stop"))
    assert included is not None
    assert included.text == " the"


def test_a_stop_string_ends_the_choice_and_later_tokens_do_not_count(codec: TextCodec) -> None:
    request = live(codec, SamplingParams(stop=("lo wo",), n=2))
    ids = codec.encode("hello world again", False)
    texts = []
    for i, token in enumerate(ids):
        delta, stopped = request.take(output([token], first=i))
        if delta is None:
            continue
        texts.append(delta.text)
        if stopped:
            assert (delta.finish_reason, delta.stop_reason) == ("stop", "lo wo")
            counted = i + 1
    assert "".join(texts) == "hel"
    assert request.num_open == 1
    request.take(output(ids, choice=1, reason="length"))
    assert request.finished().completion_tokens == 2 * counted


def test_held_back_text_comes_with_the_end(codec: TextCodec) -> None:
    request = live(codec, SamplingParams(stop=("world peace",)))
    delta, _ = request.take(output(codec.encode("hello world", False)))
    assert delta is not None
    assert delta.text == "hello "
    end, stopped = request.take(output([EOS], first=2, reason="stop"))
    assert end is not None
    assert (end.text, end.finish_reason, stopped) == ("world", "stop", False)


def test_logprobs_carry_text_and_bytes(codec: TextCodec) -> None:
    ids = codec.encode("é", False)
    marks = [TokenLogprobs(-0.5, 0, [token, 5], [-0.5, -2.0]) for token in ids]
    delta, _ = live(codec, SamplingParams(logprobs=2)).take(output(ids, logprobs=marks))
    assert delta is not None
    assert b"".join(token.raw for token in delta.logprobs) == "é".encode()
    assert delta.logprobs[0].top[1] == (5, *codec.token(5), -2.0)


def test_prompt_logprobs_begin_with_none_and_come_in_chunks(codec: TextCodec) -> None:
    request = live(codec, SamplingParams(prompt_logprobs=0))
    prompt = request.prompt_ids
    seen = []
    for _ in prompt[1:]:
        delta, _ = request.take(output([], prompt_logprobs=[TokenLogprobs(-1.0, 2)]))
        assert delta is not None
        seen += delta.prompt_logprobs
    assert seen[0] is None
    assert [token.token_id for token in seen[1:] if token is not None] == prompt[1:]


def test_resume_goes_on_in_the_middle_of_a_character_and_of_a_stop_string(codec: TextCodec) -> None:
    text = "good 日本 morning world"
    ids = codec.encode(text, False)
    whole, _ = live(codec, SamplingParams(stop=("world!",))).take(output(ids, reason="length"))
    assert whole is not None
    for cut in range(1, len(ids)):
        before, _ = live(codec, SamplingParams(stop=("world!",))).take(output(ids[:cut]))
        resumed = live(codec, SamplingParams(stop=("world!",)), [ChoiceProgress(0, ids[:cut])])
        after, _ = resumed.take(output(ids[cut:], first=cut, reason="length"))
        assert before is not None
        assert after is not None
        assert before.text + after.text == whole.text == text
        assert after.first == cut
        assert resumed.finished().completion_tokens == len(ids)


def test_stop_strings_do_not_count_before_min_tokens(codec: TextCodec) -> None:
    ids = codec.encode("END one END", False)
    first = len(codec.encode("END", False))
    request = live(codec, SamplingParams(stop=("END",), min_tokens=first))
    texts = [request.take(output([token], first=i))[0] for i, token in enumerate(ids)]
    assert "".join(delta.text for delta in texts if delta is not None) == "END one "
    assert request.num_open == 0


def test_a_client_that_wants_no_text_gets_none(codec: TextCodec) -> None:
    generate = Generate("r", "e", TextPrompt("hi"), SamplingParams(), want_text=False)
    delta, _ = LiveText("api-0", generate, [5], codec).take(output([100, 101], reason="length"))
    assert delta is not None
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", [100, 101], "length")
    # Its stop strings still need the text.
    ids = codec.encode("hello world again", False)
    generate = Generate("r", "e", TextPrompt("hi"), SamplingParams(stop=("world",)), want_text=False)
    delta, stopped = LiveText("api-0", generate, [5], codec).take(output(ids))
    assert delta is not None
    assert (delta.token_ids, delta.finish_reason, stopped) == (codec.encode("hello world", False), "stop", True)


def test_news_of_a_former_life_are_dropped(codec: TextCodec) -> None:
    generate = Generate("r", "e", TextPrompt("hi"), SamplingParams(), epoch=2)
    request = LiveText("api-0", generate, [5], codec)
    assert request.take(output([100], epoch=1)) == (None, False)
    assert request.take(output([100], epoch=2))[0] is not None


def test_prompt_logprobs_of_a_single_token_and_of_too_many_entries(codec: TextCodec) -> None:
    generate = Generate("r", "e", TextPrompt("hi"), SamplingParams(prompt_logprobs=0))
    first, _ = LiveText("api-0", generate, [5], codec).take(output([100]))
    assert first is not None
    assert first.prompt_logprobs == [None]
    request = LiveText("api-0", generate, [5, 6], codec)
    for expected in ([None, 6], []):
        delta, _ = request.take(output([100], prompt_logprobs=[TokenLogprobs(-1.0, 0)] * 2))
        assert delta is not None
        assert [token and token.token_id for token in delta.prompt_logprobs] == expected


def test_a_resumed_request_does_not_repeat_the_prompt(codec: TextCodec) -> None:
    resumed = live(codec, SamplingParams(prompt_logprobs=0), [ChoiceProgress(0, [100])])
    delta, _ = resumed.take(output([101], first=1, prompt_logprobs=[TokenLogprobs(-1.0, 0)]))
    assert delta is not None
    assert delta.prompt_logprobs == []


@pytest.mark.parametrize("every", [2, 5, 32])
def test_held_news_adds_up_to_the_same(codec: TextCodec, every: int) -> None:
    """Token by token or in pieces: the same text, ids and log-probabilities; the first token is told at once."""
    ids = codec.encode("the quick brown fox jumps over the lazy dog and comes back again", False)
    sampling = SamplingParams(stop=("dog and",), logprobs=1, prompt_logprobs=0)
    request = live(codec, sampling)
    held = LiveText(
        "api-0", Generate("r", "e", TextPrompt("hi"), sampling, delta_tokens=every), request.prompt_ids, codec
    )
    found = []
    for told in (request, held):
        deltas = []
        for i, token in enumerate(ids):
            marks = [TokenLogprobs(-0.1 * i, 0, [token], [-0.1 * i])]
            prompt = [TokenLogprobs(-1.0, 0, [], []) for _ in request.prompt_ids[1:]] if i == 0 else []
            news, stopped = told.take(output([token], first=i, logprobs=marks, prompt_logprobs=prompt))
            if news is not None:
                deltas.append(news)
            if stopped:
                break
        assert [len(d.token_ids) for d in deltas[1:-1]] == [1 if told is request else every] * (len(deltas) - 2)
        assert [d.first for d in deltas] == [sum(len(e.token_ids) for e in deltas[:i]) for i in range(len(deltas))]
        assert len(deltas[0].token_ids) == 1
        last = deltas[-1]
        found.append((
            "".join(d.text for d in deltas), [t for d in deltas for t in d.token_ids],
            [t for d in deltas for t in d.logprobs], [t for d in deltas for t in d.prompt_logprobs],
            last.finish_reason, last.stop_reason, told.finished(),
        ))  # fmt: skip
    assert found[0] == found[1]
    assert found[0][4:6] == ("stop", "dog and")
