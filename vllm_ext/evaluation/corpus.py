"""Real prose shipped with the package: filler for needles, held-out text for divergence and perplexity."""

from __future__ import annotations

import functools
import gzip
import importlib.resources
import re
from typing import Any

FILLER = "prose.txt.gz"
HELD_OUT = "prose_heldout.txt.gz"


@functools.cache
def load(name: str = FILLER) -> str:
    """The text of one shipped file (see NOTICE.txt); one line is one paragraph.

    Args:
        name: `FILLER` or `HELD_OUT`.
    """
    data = importlib.resources.files("vllm_ext.evaluation").joinpath(name).read_bytes()
    return gzip.decompress(data).decode("utf-8")


@functools.lru_cache(maxsize=4)
def sentences(tokenizer: Any, name: str = FILLER) -> tuple[tuple[int, ...], ...]:
    """Token ids of every sentence, in order, each with its leading space, so that they concatenate naturally.

    Args:
        tokenizer: a Hugging Face tokenizer.
        name: the shipped file.
    """
    parts = [s for s in re.split(r"(?<=[.?!])\s+", load(name)) if s.strip()]
    encoded = tokenizer([f" {s.strip()}" for s in parts], add_special_tokens=False)["input_ids"]
    return tuple(tuple(ids) for ids in encoded)


@functools.lru_cache(maxsize=4)
def tokens(tokenizer: Any, name: str = HELD_OUT) -> tuple[int, ...]:
    """Token ids of a whole shipped file, sentence by sentence, without special tokens."""
    return tuple(t for sentence in sentences(tokenizer, name) for t in sentence)


def windows(tokenizer: Any, count: int, length: int, name: str = HELD_OUT) -> list[list[int]]:
    """`count` windows of `length` tokens, spread evenly over the file; they overlap only if the file is too short.

    Args:
        tokenizer: a Hugging Face tokenizer; its BOS, if it adds one, opens every window and counts as one token.
        count: number of windows.
        length: tokens a window, BOS included.

    Raises:
        ValueError: the file is shorter than one window.
    """
    text, bos = tokens(tokenizer, name), leading_special(tokenizer)
    need = length - len(bos)
    room = len(text) - need
    if need < 1 or room < 0:
        raise ValueError(f"{name} has {len(text)} tokens, a window of {length} does not fit.")
    starts = [round(i * room / max(count - 1, 1)) for i in range(count)]
    return [bos + list(text[s : s + need]) for s in starts]


def leading_special(tokenizer: Any) -> list[int]:
    """The BOS token as a list, if the tokenizer opens every text with it, else an empty list."""
    ids = list(tokenizer("")["input_ids"])
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
