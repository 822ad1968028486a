"""Text to train on: the prose shipped with the package or the user's files, as token windows; and passkey prompts.

What a step sees is a function of (seed, step) alone.
"""

from __future__ import annotations

import functools
import gzip
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_ext.evaluation import corpus
from vllm_ext.options import ConfigError

WORDS = (
    "amber", "basil", "cedar", "dune", "ember", "fjord", "grove", "heron", "iris", "jade", "kelp", "lotus", "maple",
    "nectar", "onyx", "pearl", "quartz", "raven", "sage", "thistle", "umber", "violet", "willow", "yarrow", "zinc",
)  # fmt: skip
"""What passkeys are made of."""

PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
CHARS_AT_ONCE = 200_000


def read(paths: Sequence[Path]) -> list[str]:
    """The files' text (UTF-8, plain or .gz); without files, the shipped filler prose.

    Raises:
        ConfigError: a file is missing or is no text.
    """
    if not paths:
        return [corpus.load(corpus.FILLER)]
    texts = []
    for path in paths:
        try:
            data = path.read_bytes()
            texts.append((gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8"))
        except (OSError, UnicodeDecodeError, EOFError) as error:
            raise ConfigError(f"--text {path} cannot be read as UTF-8 text ({type(error).__name__}).") from error
    return texts


def encode(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids of all texts in one row, int32 [n], without special tokens."""
    parts = [t[i : i + CHARS_AT_ONCE] for t in texts for i in range(0, len(t), CHARS_AT_ONCE)]
    ids = tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([i for part in ids for i in part], dtype=torch.int32)


def windows(tokens: Tensor, count: int, length: int, gen: torch.Generator, opening: Sequence[int] = ()) -> Tensor:
    """`count` windows from random places: int64 [count, length], each opened by the tokens `opening`.

    Raises:
        ConfigError: the text is shorter than a window.
    """
    need = length - len(opening)
    room = tokens.numel() - need
    if room < 0:
        raise ConfigError(f"the text has {tokens.numel()} tokens, a window of {length} does not fit; give more --text.")
    starts = torch.randint(room + 1, (count, 1), generator=gen)
    picked = tokens[starts + torch.arange(need)].long()
    head = torch.tensor(opening, dtype=torch.int64).expand(count, -1)
    return torch.cat([head, picked], 1)


@functools.lru_cache(maxsize=4)
def shortest(tokenizer: Any, labels: int) -> int:
    """A length that holds the passkeys and questions of any prompt of `passkeys`, with some text between them."""
    needles = sum(len(tokenizer(f"\n\nRemember: the {p} passkey is .\n\n")["input_ids"]) for p in PLACES)
    words = max(len(tokenizer(f" {w}", add_special_tokens=False)["input_ids"]) for w in WORDS)
    return labels + needles + len(PLACES) * 8 * words + 100


def passkeys(
    tokenizer: Any, tokens: Tensor, length: int, labels: int, seed: int, step: int, *, keys: int = 10, words: int = 8
) -> list[int]:
    """`keys` passkeys of `words` words hidden in text, then asked for and answered (LycheeDecode, section 4.1).

    Args:
        length: tokens of the whole prompt, exactly.
        labels: how many of them, at the end, are questions with their answers; answers that do not fit are cut.

    Raises:
        ConfigError: no room for text in `length`, or too little text.
    """
    rng = random.Random(f"{seed}/{step}/{length}")

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    secrets = [" ".join(rng.choices(WORDS, k=words)) for _ in range(keys)]
    needles = [ids(f"\n\nRemember: the {PLACES[i]} passkey is {s}.\n\n") for i, s in enumerate(secrets)]
    order = rng.sample(range(keys), keys)
    answers = [t for i in order for t in ids(f"\n\nThe {PLACES[i]} passkey is {secrets[i]}.")][:labels]
    head = corpus.leading_special(tokenizer) + ids("This text hides passkeys.\n\n")
    room = length - len(head) - len(answers) - sum(map(len, needles))
    if room < 1 or room > tokens.numel():
        raise ConfigError(
            f"a window of {length} tokens with {keys} passkeys needs {length - room} tokens besides text, and there "
            f"are {tokens.numel()} tokens of text; change --window or give more --text."
        )
    start = rng.randrange(tokens.numel() - room + 1)
    prose = tokens[start : start + room].tolist()
    cuts = [0, *sorted(int(rng.uniform(0.05, 0.95) * room) for _ in range(keys)), room]
    context = list(head)
    for i, needle in enumerate([*needles, []]):
        context += prose[cuts[i] : cuts[i + 1]] + needle
    return context + answers
