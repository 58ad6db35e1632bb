"""Journal: what one live request has produced so far, kept where the client's connection is.

The journal is what makes a death below harmless: the request can be handed to a restarted engine with its prompt and
its output ids apart, and what arrives twice or from an earlier life is recognised by (epoch, first) and dropped.
"""

from __future__ import annotations

import msgspec

from core.messages import ChoiceProgress, Delta, Finished, Generate


class ChoiceJournal(msgspec.Struct):
    """One choice. Text and log-probabilities themselves have been handed on; how much of them is what counts here."""

    output_ids: list[int] = []
    num_chars: int = 0
    num_logprobs: int = 0
    finished: bool = False


class Journal:
    """The request as it was sent, and the progress of each of its choices."""

    def __init__(self, request: Generate) -> None:
        self.request = request
        self.choices = [ChoiceJournal() for _ in range(request.sampling.n)]
        self.num_settled = 0  # tokens of the choices that had finished before the last resume

    def record(self, delta: Delta) -> Delta | None:
        """Note a Delta and return what of it is new: the same Delta, its unseen rest, or None.

        Raises ValueError for a gap (tokens that never arrived) and for a choice that the request does not have.
        """
        if delta.epoch != self.request.epoch:
            return None
        if not 0 <= delta.choice < len(self.choices):
            raise ValueError(f"choice {delta.choice} of a request with {len(self.choices)}")
        choice = self.choices[delta.choice]
        if choice.finished:
            return None
        if delta.token_ids:
            seen = len(choice.output_ids) - delta.first
            if seen < 0:
                raise ValueError(
                    f"tokens {len(choice.output_ids)} to {delta.first} of choice {delta.choice} are missing"
                )
            if seen > 0:
                if seen >= len(delta.token_ids) and delta.finish_reason is None:
                    return None
                delta = msgspec.structs.replace(
                    delta, first=delta.first + seen, token_ids=delta.token_ids[seen:], logprobs=delta.logprobs[seen:]
                )
            choice.output_ids += delta.token_ids
        choice.num_chars += len(delta.text)
        choice.num_logprobs += len(delta.logprobs)
        choice.finished = delta.finish_reason is not None
        return delta

    def complete(self, ending: Finished) -> Finished:
        """The ending with the usage of all choices."""
        if not self.num_settled:
            return ending
        return msgspec.structs.replace(ending, completion_tokens=ending.completion_tokens + self.num_settled)

    def resume(self) -> Generate:
        """The request to send to a restarted engine: the next epoch, with the output ids of its unfinished choices.

        It becomes the current one. Below nobody will know of the finished choices: `complete` adds their tokens.
        """
        progress = [
            ChoiceProgress(index, list(choice.output_ids))
            for index, choice in enumerate(self.choices)
            if not choice.finished
        ]
        self.num_settled = sum(len(choice.output_ids) for choice in self.choices if choice.finished)
        self.request = msgspec.structs.replace(self.request, epoch=self.request.epoch + 1, resume=progress)
        return self.request
