"""`quire chat`: talk to a running server, streaming. /reset forgets the conversation, /exit (or Ctrl-D) leaves."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import quire


def main(argv: list[str] | None = None) -> int:
    """Read messages from the terminal (or a pipe, one per line), stream the answers. 1 when no server is found."""
    parser = argparse.ArgumentParser(prog="quire chat", description=__doc__)
    parser.add_argument("--address", help="ZeroMQ address of the server; default: this user's newest server")
    parser.add_argument("--model", help="name of the model; default: the server's")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args(argv)
    sampling = quire.SamplingParams(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
    )
    try:
        with quire.Client(arguments.address) as client:
            model = arguments.model or str(client.models()[0]["id"])
            return converse(client, model, sampling, arguments.system)
    except quire.QuireError as error:
        print(f"quire chat: {error.message}", file=sys.stderr)
        return 1


def converse(client: quire.Client, model: str, sampling: quire.SamplingParams, system: str | None) -> int:
    """The loop of one conversation."""
    terminal = sys.stdin.isatty()
    start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    if terminal:
        print(f"{model}. /reset forgets, /exit leaves.")
    while True:
        try:
            line = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            return 0
        if line.strip() == "/exit":
            return 0
        if line.strip() == "/reset":
            messages = list(start)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": answer(client, model, messages, sampling)})
        except KeyboardInterrupt:
            messages.pop()
            print(" (interrupted)")
        except quire.QuireError as error:
            messages.pop()
            print(f"error: {error.message}", file=sys.stderr)


def answer(client: quire.Client, model: str, messages: list[dict[str, Any]], sampling: quire.SamplingParams) -> str:
    """Stream one answer to the terminal; returns it. Leaving early aborts the request."""
    text = ""
    with client.stream(messages=messages, model=model, sampling=sampling) as stream:
        for event in stream:
            text += event.text
            print(event.text, end="", flush=True)
    print()
    return text


if __name__ == "__main__":
    sys.exit(main())
