"""Prompts of the speculation benchmark, made from text that is shipped or comes with Python; seeded."""

from __future__ import annotations

import inspect
import json
import random
import statistics
import textwrap
from collections.abc import Callable
from typing import Any

from vllm_ext.evaluation import corpus

QUESTIONS = (
    "How does a suspension bridge carry its load?",
    "Give me three ideas for a rainy afternoon with children.",
    "Explain the difference between a virus and a bacterium.",
    "What should I pack for a week of hiking?",
    "Why is the sky blue?",
    "Write a short poem about an old lighthouse.",
    "How do I make a simple vegetable soup?",
    "What causes the seasons?",
    "Describe a busy market in the morning.",
    "How can I learn to draw?",
)


def _edit(rnd: random.Random) -> str:
    """Code editing: repeat a function with one name changed."""
    functions = [f for _, f in inspect.getmembers(statistics, inspect.isfunction) if f.__module__ == "statistics"]
    functions += [f for _, f in inspect.getmembers(textwrap, inspect.isfunction) if f.__module__ == "textwrap"]
    sources = [s for s in map(inspect.getsource, functions) if 500 < len(s) < 2500]
    source = rnd.choice(sources)
    return f"Rename the function's first parameter to `values` and repeat the whole code.\n\n```python\n{source}```"


def _summary(rnd: random.Random) -> str:
    """Summarisation with copying: quote sentences of a passage."""
    lines = [line for line in corpus.load(corpus.HELD_OUT).split("\n") if len(line) > 200]
    start = rnd.randrange(max(1, len(lines) - 6))
    passage = "\n".join(lines[start : start + 6])[:3500]
    return f"Quote the most important sentences of this passage, word for word.\n\n{passage}"


def _chat(rnd: random.Random) -> str:
    """Chat: an open question, little to copy."""
    return f"{rnd.choice(QUESTIONS)} Answer in about {rnd.choice((80, 120, 150))} words."


def _agent(rnd: random.Random) -> str:
    """An agent's trace: tool calls of one form, again and again."""
    cities = ["Oslo", "Lima", "Cairo", "Quito", "Turin", "Porto", "Delhi", "Osaka"]
    rnd.shuffle(cities)
    turns = []
    for city in cities[:5]:
        call = {"tool": "weather.lookup", "arguments": {"city": city, "unit": "celsius", "days": 3, "wind": True}}
        found = {"city": city, "unit": "celsius", "forecast": [rnd.randrange(-5, 35) for _ in range(3)], "wind": 7}
        turns.append(f"CALL {json.dumps(call)}\nRESULT {json.dumps(found)}")
    trace = "\n".join(turns)
    return (
        f"This is the log of an assistant that calls tools.\n{trace}\n\nContinue the log in the same format for the "
        f"cities {', '.join(cities[5:])}."
    )


LOADS: dict[str, Callable[[random.Random], str]] = {"edit": _edit, "summary": _summary, "chat": _chat, "agent": _agent}
"""Load -> maker of one user message. "mixed" interleaves all of them."""
LOADS["mixed"] = lambda rnd: LOADS[rnd.choice(("edit", "summary", "chat", "agent"))](rnd)


def prompts(load: str, tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Token ids of `count` prompts of a load, in the model's chat form if it has one."""
    rnd = random.Random(f"{load}-{seed}")
    texts = [LOADS[load](rnd) for _ in range(count)]
    if getattr(tokenizer, "chat_template", None):
        messages = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
