"""Needle in a haystack: numbers hidden in real prose, asked for after the context, at an exact token length."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from vllm_ext.evaluation.corpus import leading_special, sentences

CITIES = (
    "Paris", "Tokyo", "Lima", "Oslo", "Delhi", "Quito", "Madrid", "Dublin", "Vienna", "Prague", "Havana", "Seoul",
    "Bogota", "Lisbon", "Warsaw", "Nairobi", "Toronto", "Sydney", "Chicago", "Boston",
)  # fmt: skip
"""Keys of the needles; none of them occurs in the filler."""

MOST_VALUES = 8
"""Most numbers of one key."""

INSTRUCTION = "Some special magic numbers are hidden in the following text. Remember them.\n\n"


@dataclass(frozen=True)
class NiahSample:
    """One prompt.

    Attributes:
        prompt_token_ids: exactly the requested number of tokens.
        prompt: the same as text.
        answers: the numbers asked for, in the order in which they lie in the text; 7 digits each.
        prefix: the begun answer that ends the prompt.
        context_tokens: how many leading tokens come before the question (template head, instruction, prose).
        depth: where the first asked needle begins, as a share of the prose that was really reached.
    """

    prompt_token_ids: list[int]
    prompt: str
    answers: list[str]
    prefix: str
    context_tokens: int
    depth: float


def make_niah(
    tokenizer: Any, length: int, depth: float, seed: int, *, keys: int = 1, values: int = 1, chat: bool = True
) -> NiahSample:
    """Build one prompt, deterministic in its arguments.

    Args:
        tokenizer: a Hugging Face tokenizer.
        length: tokens of the whole prompt, template, question and begun answer included.
        depth: place of the (first) needle in the prose, 0 = start, 1 = end; sentence boundaries are kept.
        seed: picks the stretch of prose, the keys and the numbers.
        keys: number of keys with needles; only one is asked for, the others distract and lie anywhere.
        values: numbers of the asked key; the first lies at `depth`, the others anywhere.
        chat: use the tokenizer's chat template (required if True); otherwise plain text.

    Raises:
        ValueError: no chat template, too many keys, depth out of range, or no room for the needles.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must be between 0 and 1, got {depth}.")
    if not (1 <= keys <= len(CITIES) and 1 <= values <= MOST_VALUES):
        raise ValueError(f"keys must be 1 to {len(CITIES)} and values 1 to {MOST_VALUES}, got {keys} and {values}.")
    rng = random.Random(f"{seed}/{length}/{depth}/{keys}/{values}")
    cities = rng.sample(CITIES, keys)
    numbers = [str(n) for n in rng.sample(range(1_000_000, 10_000_000), keys - 1 + values)]
    owners = [cities[0]] * values + cities[1:]
    needles = [_encode(tokenizer, f" The special magic number for {c} is {n}.") for c, n in zip(owners, numbers)]
    question, prefix = _question(cities[0], values)
    head, tail = _frame(tokenizer, question, prefix, chat)
    room = length - len(head) - len(tail) - sum(map(len, needles))
    if room < 1:
        raise ValueError(f"length {length} leaves no room for prose: {length - room} tokens are needed without it.")
    filler = _stretch(tokenizer, room, rng)
    places = [depth] + [rng.random() for _ in needles[1:]]
    context, order, reached = _insert(filler, needles, places)
    ids = head + context + tail
    answers = [numbers[i] for i in order if i < values]
    return NiahSample(ids, tokenizer.decode(ids), answers, prefix, len(head) + len(context), reached)


def score(text: str, answers: list[str]) -> list[bool]:
    """For each expected number, whether it stands in the generated text as a number of its own."""
    return [re.search(rf"(?<!\d){a}(?!\d)", text) is not None for a in answers]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _question(city: str, values: int) -> tuple[str, str]:
    """Question and begun answer for one or several numbers."""
    if values == 1:
        return (
            f"\n\nWhat is the special magic number for {city} mentioned in the text above?",
            f"The special magic number for {city} is",
        )
    return (
        f"\n\nWhat are all {values} special magic numbers for {city} mentioned in the text above?",
        f"The {values} special magic numbers for {city} mentioned in the text above are",
    )


def _frame(tokenizer: Any, question: str, prefix: str, chat: bool) -> tuple[list[int], list[int]]:
    """Token ids before the prose and after it."""
    if not chat:
        return leading_special(tokenizer) + _encode(tokenizer, INSTRUCTION), _encode(tokenizer, f"{question}\n{prefix}")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template; ask for plain prompts (chat=False).")
    mark = "<<prose>>"
    message = [{"role": "user", "content": INSTRUCTION + mark + question}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    before, _, after = text.partition(mark)
    return _encode(tokenizer, before), _encode(tokenizer, after + prefix)


def _stretch(tokenizer: Any, room: int, rng: random.Random) -> list[list[int]]:
    """Sentences of exactly `room` tokens in all from a random place; the first ones are cut to fit.

    The prose is read cyclically, so a prompt longer than the file repeats it.
    """
    book = sentences(tokenizer)
    at = rng.randrange(len(book))
    picked: list[list[int]] = []
    total = 0
    while total < room:
        picked.append(list(book[at % len(book)]))
        total += len(picked[-1])
        at += 1
    # Cut at the front: the prose then ends with a whole sentence, right before the question.
    excess = total - room
    while excess >= len(picked[0]):
        excess -= len(picked.pop(0))
    picked[0] = picked[0][excess:]
    return picked


def _insert(
    filler: list[list[int]], needles: list[list[int]], places: list[float]
) -> tuple[list[int], list[int], float]:
    """The prose with the needles at the sentence boundaries nearest to `places`.

    Returns:
        the token ids, the needles' numbers in the order of the text, and the reached depth of needle 0.
    """
    starts = [0]
    for sentence in filler:
        starts.append(starts[-1] + len(sentence))
    total = starts[-1]
    slot = [min(range(len(starts)), key=lambda b, p=p: abs(starts[b] - p * total)) for p in places]  # type: ignore[misc]
    order = sorted(range(len(needles)), key=lambda i: (slot[i], i))
    context: list[int] = []
    reached = 0.0
    for boundary in range(len(starts)):
        for i in order:
            if slot[i] == boundary:
                reached = starts[boundary] / max(total, 1) if i == 0 else reached
                context += needles[i]
        if boundary < len(filler):
            context += filler[boundary]
    return context, order, reached
