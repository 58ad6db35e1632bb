"""`quire bench parity`: greedy answers to 200 chat prompts, long stories among them, against transformers.generate.

Quire answers through its whole stack, 16 at a time; transformers answers one by one. float32. Every token must agree.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import quire
from core.chat_template import ChatTemplate
from core.model_info import resolve
from core.text_codec import TextCodec
from tools.bench.prompts import draw


def main(argv: list[str] | None = None) -> int:
    """Print how many answers are identical, and each that is not. 1 when one differs."""
    parser = argparse.ArgumentParser(prog="quire bench parity", description=__doc__)
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    different, num_tokens, longest = compare(arguments.model, arguments.prompts, arguments.max_tokens, arguments.seed)
    for text in different:
        print(text)
    same = arguments.prompts - len(different)
    print(f"{same} of {arguments.prompts} answers identical ({num_tokens:,} tokens, the longest {longest})")
    return 1 if different else 0


def compare(model: str, count: int, max_tokens: int, seed: int = 0) -> tuple[list[str], int, int]:
    """(descriptions of answers that differ, tokens compared, tokens of the longest answer)."""
    conversations = draw(count, seed)
    # Stories go on past their end, to max_tokens: long texts are where a wrong position or block would show.
    endless = ["story" in messages[-1]["content"] for messages in conversations]
    sampling = [quire.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=on) for on in endless]
    with quire.LLM(model, dtype="float32", max_num_seqs=16) as llm:
        answers = llm.generate(conversations, sampling, progress=False)
    info = resolve(model)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(info.path, dtype=torch.float32).eval()
    codec, template = TextCodec(Path(info.path)), ChatTemplate.load(Path(info.path))
    assert template is not None
    different: list[str] = []
    num_tokens = longest = 0
    for messages, answer, on in zip(conversations, answers, endless, strict=True):
        prompt = codec.encode(template.render(messages), False)
        want = reference(theirs, prompt, max_tokens, [] if on else info.eos_ids)
        num_tokens += len(want)
        longest = max(longest, len(want))
        if answer.token_ids != want:
            at = next((i for i, (a, b) in enumerate(zip(answer.token_ids, want, strict=False)) if a != b), -1)
            asked = messages[-1]["content"]
            different.append(f"{asked!r} differs at token {at}: {answer.text!r} / {codec.decode(want, True)!r}")
    return different, num_tokens, longest


@torch.inference_mode()
def reference(model: Any, prompt: list[int], max_tokens: int, eos_ids: list[int]) -> list[int]:
    """transformers' greedy continuation, its end included."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=eos_ids or None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


if __name__ == "__main__":
    sys.exit(main())
