"""Prompts: chat messages that tiny-chat knows how to answer, drawn from a seed; some ask for long stories."""

from __future__ import annotations

import random

COUNTRIES = [
    "Hungary",
    "France",
    "Japan",
    "Kenya",
    "Peru",
    "Norway",
    "Italy",
    "Egypt",
    "Canada",
    "Spain",
    "India",
    "Chile",
]
WORDS = [
    "river",
    "stone",
    "lamp",
    "garden",
    "window",
    "planet",
    "bread",
    "silver",
    "forest",
    "engine",
    "violin",
    "cloud",
]
STORIES = [
    "Tell me a long story about a {}.",
    "Tell me a story about a {} and a {}.",
    "Write a long story with a {}.",
    "Tell me a very long story.",
]
TOOL = (
    '# Tools\nTo call a tool, write <tool_call>{{"name": ..., "arguments": {{...}}}}</tool_call>.\n'
    '{{"name": "get_weather", "parameters": {{"type": "object", "properties": {{"city": {{"type": "string"}}}}}}}}'
)


def draw(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """`count` conversations: sums, comparisons, facts, words, JSON, Python, tools, stories; some of several turns."""
    rng = random.Random(seed)
    return [_one(rng, index) for index in range(count)]


def _one(rng: random.Random, index: int) -> list[dict[str, str]]:
    a, b = rng.randint(1, 999), rng.randint(1, 999)
    word, other, country = rng.choice(WORDS), rng.choice(WORDS), rng.choice(COUNTRIES)
    asked = [
        f"What is {a} + {b}?",
        f"What is {max(a, b)} - {min(a, b)}?",
        f"Which is larger, {a} or {b}?",
        f"What is the capital of {country}?",
        f"Spell the word {word} backwards.",
        f"How many letters are in the word {word}?",
        f"Extract as JSON: {word.title()} is {a % 90} years old and lives in {country}.",
        f"Write a Python function that adds {a} to a number.",
        f"What is the weather in {country}?",
        rng.choice(STORIES).format(word, other),
    ][index % 10]
    messages = [{"role": "user", "content": asked}]
    if index % 10 == 8:
        messages.insert(0, {"role": "system", "content": TOOL.format()})
    if index % 7 == 3:
        messages = [
            {"role": "user", "content": f"What is {b} + {a}?"},
            {"role": "assistant", "content": f"{b} + {a} = {a + b}."},
            *messages,
        ]
    return messages
