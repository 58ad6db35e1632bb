"""LiveText: one request on its way through the tokenizer: its choices' texts, their endings, and usage."""

from __future__ import annotations

from core.detokenizer import Detokenizer, new_detokenizer
from core.messages import Delta, Finished, Generate, SequenceOutput, TokenLogprobs, TokenText
from core.stop_strings import StopStrings
from core.text_codec import TextCodec


class ChoiceText:
    """One choice: ids in, text out, up to its end.

    detokenizer: None for a client that wants no text.
    min_tokens: the first so many tokens are not searched for stop strings, as they may not end the choice.
    """

    __slots__ = ("_unsearched", "detokenizer", "done", "held", "num_tokens", "stops")

    def __init__(self, detokenizer: Detokenizer | None, stops: StopStrings | None, min_tokens: int = 0) -> None:
        self.detokenizer = detokenizer
        self.stops = stops
        self.num_tokens = 0
        self.done = False
        self.held: Delta | None = None
        self._unsearched = min_tokens

    def push(self, token_id: int) -> str:
        """The text that a token adds for the client; sets stops.hit at a stop string."""
        if self.detokenizer is None:
            return ""
        text = self.detokenizer.push(token_id)
        if self.stops is None:
            return text
        if self._unsearched:
            self._unsearched -= 1
            return text
        return self.stops.push(text)

    def gather(self, news: Delta, num_tokens: int) -> Delta | None:
        """News of `num_tokens` tokens at once: None while they are too few and the choice goes on. The first token is
        not held: when it came is measured."""
        if self.held is not None:
            news = _joined(self.held, news)
        self.held = news if news.finish_reason is None and news.first > 0 and len(news.token_ids) < num_tokens else None
        return news if self.held is None else None

    def flush(self) -> str:
        """What was held back, at an end that no stop string made."""
        if self.detokenizer is None:
            return ""
        text = self.detokenizer.flush()
        if self.stops is None:
            return text
        shown = self.stops.push(text)
        return shown if self.stops.hit is not None else shown + self.stops.flush()


def _joined(earlier: Delta, later: Delta) -> Delta:
    return Delta(
        later.request_id,
        later.choice,
        earlier.first,
        earlier.text + later.text,
        earlier.token_ids + later.token_ids,
        earlier.logprobs + later.logprobs,
        later.finish_reason,
        later.stop_reason,
        earlier.prompt_logprobs + later.prompt_logprobs,
        later.epoch,
    )


class LiveText:
    """A request under way. `take` turns the scheduler's news of a choice into the client's."""

    __slots__ = (
        "cached_tokens", "choices", "codec", "delta_tokens", "epoch", "num_open", "peer", "prompt_ids", "prompt_seen",
        "queued_s", "request_id", "sampling", "stop_hits", "want_text",
    )  # fmt: skip

    def __init__(self, peer: str, generate: Generate, prompt_ids: list[int], codec: TextCodec) -> None:
        self.peer = peer
        self.request_id = generate.request_id
        self.epoch = generate.epoch
        self.want_text = generate.want_text
        self.delta_tokens = generate.delta_tokens
        self.sampling = generate.sampling
        self.prompt_ids = prompt_ids
        self.prompt_seen = 0
        self.codec = codec
        self.cached_tokens = 0
        self.queued_s = 0.0
        self.stop_hits = 0
        self.choices = [self._new_choice() for _ in range(generate.sampling.n)]
        self.num_open = generate.sampling.n
        if generate.resume:
            self._replay(generate)

    def _new_choice(self) -> ChoiceText:
        sampling = self.sampling
        stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output) if sampling.stop else None
        if not self.want_text and stops is None:
            return ChoiceText(None, None)
        return ChoiceText(new_detokenizer(self.codec, sampling.skip_special_tokens), stops, sampling.min_tokens)

    def _replay(self, generate: Generate) -> None:
        """Bring the choices to where they were; the client has that text already."""
        resumed = {progress.choice: progress.output_ids for progress in generate.resume}
        for index, choice in enumerate(self.choices):
            if index not in resumed:
                choice.done = True
                self.num_open -= 1
                continue
            for token_id in resumed[index]:
                choice.push(token_id)
            choice.num_tokens = len(resumed[index])
            if resumed[index]:
                self.prompt_seen = len(self.prompt_ids)  # what is known of the prompt came before the first token

    def take(self, output: SequenceOutput) -> tuple[Delta | None, bool]:
        """The client's news, and whether a stop string ended the choice (the scheduler must be told).

        None for news of a choice that has ended (tokens after a stop string are dropped and not counted), for news of
        the request's life before it was resumed, and for what is held until there is more of it.
        """
        choice = self.choices[output.choice]
        if choice.done or output.epoch != self.epoch:
            return None, False
        self.cached_tokens = self.cached_tokens or output.cached_tokens
        token_ids = output.token_ids
        finish_reason: str | None = output.finish_reason
        stop_reason: str | int | None = output.stop_reason
        # A token that ends the sequence is not text, unless asked for.
        silent = len(token_ids) - 1 if finish_reason == "stop" and not self.sampling.include_stop_str_in_output else -1
        text = ""
        stopped = False
        for i, token_id in enumerate(token_ids):
            if i == silent:
                break
            text += choice.push(token_id)
            if choice.stops is not None and choice.stops.hit is not None:
                token_ids = token_ids[: i + 1]
                stopped = output.finish_reason is None or len(token_ids) < len(output.token_ids)
                finish_reason, stop_reason = "stop", choice.stops.hit
                break
        if finish_reason is not None:
            if choice.stops is None or choice.stops.hit is None:
                text += choice.flush()
                if choice.stops is not None and choice.stops.hit is not None:
                    finish_reason, stop_reason = "stop", choice.stops.hit
            choice.done = True
            self.num_open -= 1
            self.stop_hits += stopped
        first = choice.num_tokens
        choice.num_tokens += len(token_ids)
        news = Delta(
            self.request_id,
            output.choice,
            first,
            text,
            token_ids,
            self._logprobs(token_ids, output.logprobs),
            finish_reason,
            stop_reason,
            self._prompt_logprobs(output.prompt_logprobs),
            output.epoch,
        )
        told = news if self.delta_tokens == 1 else choice.gather(news, self.delta_tokens)
        return told, stopped and output.finish_reason is None

    def finished(self) -> Finished:
        """The ending, once num_open is 0."""
        total = sum(choice.num_tokens for choice in self.choices)
        return Finished(self.request_id, len(self.prompt_ids), total, self.cached_tokens, self.queued_s)

    def _logprobs(self, token_ids: list[int], logprobs: list[TokenLogprobs]) -> list[TokenText]:
        if not logprobs:
            return []
        return [self._token(token_id, entry) for token_id, entry in zip(token_ids, logprobs, strict=False)]

    def _prompt_logprobs(self, logprobs: list[TokenLogprobs]) -> list[TokenText | None]:
        """None for the first token, before which there is nothing, then one for each entry."""
        if not logprobs and (self.prompt_seen or self.sampling.prompt_logprobs is None):
            return []
        tokens: list[TokenText | None] = []
        if self.prompt_seen == 0:
            tokens.append(None)
            self.prompt_seen = 1
        for entry, token_id in zip(logprobs, self.prompt_ids[self.prompt_seen :], strict=False):
            tokens.append(self._token(token_id, entry))
        self.prompt_seen += len(logprobs)
        return tokens

    def _token(self, token_id: int, entry: TokenLogprobs) -> TokenText:
        token = self.codec.token
        top = [
            (other, *token(other), logprob) for other, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        ]
        return TokenText(token_id, *token(token_id), entry.logprob, entry.rank, top)
