"""The suffix automaton against a search in the text itself."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numba import njit

from vllm_ext.spec_decode import automaton
from vllm_ext.spec_decode.automaton import FIRST, LAST, LENGTH, LINK, RECENT, SIZE, STATES


def longest_repeated_suffix(text: list[int]) -> int:
    """Length of the longest suffix that also ends earlier."""
    n = len(text)
    return next((k for k in range(n - 1, 0, -1) if any(text[e - k : e] == text[n - k :] for e in range(k, n))), 0)


def strings(count: int, rnd: random.Random):
    """Random, periodic, Fibonacci and nearly periodic strings over small alphabets."""
    fibonacci = [0]
    before = [1]
    while len(fibonacci) < 60:
        fibonacci, before = fibonacci + before, fibonacci
    for i in range(count):
        n, kinds = rnd.randint(1, 24), rnd.choice((1, 2, 3, 5))
        text = [rnd.randrange(kinds) for _ in range(n)]
        if i % 10 == 1:
            text = (text[: rnd.randint(1, 4)] * n)[:n]
        elif i % 10 == 2:
            start = rnd.randrange(20)
            text = fibonacci[start : start + n]
        elif i % 10 == 3:
            text = (text[: rnd.randint(1, 4)] * n)[:n]
            text[rnd.randrange(len(text))] ^= 1
        yield text


def test_ten_thousand_strings():
    """After each token: length of the match, and two ends at which it really occurs before."""
    parts = automaton.arrays(64)
    for text in strings(10_000, random.Random(0)):
        automaton.clear(parts[0], parts[2], parts[3])
        for i, token in enumerate(text):
            automaton.append(*parts, token)
            state = parts[0][LINK, parts[3][LAST]]
            length = int(parts[0][LENGTH, state])
            if i == len(text) - 1 or i % 5 == 4:
                assert length == longest_repeated_suffix(text[: i + 1])
            for row in (FIRST, RECENT):
                end = int(parts[0][row, state])
                assert end <= i or length == 0
                assert text[end - length : end] == text[i + 1 - length : i + 1]
        assert parts[3][STATES] <= 2 * len(text) + 1
        assert parts[3][automaton.EDGES] <= 3 * len(text) + 1


def test_cursor_over_other_texts():
    """A cursor finds a suffix of one text that occurs in others, also while those grow and states are split."""
    rnd = random.Random(1)
    for _ in range(300):
        parts = automaton.arrays(80)
        automaton.clear(parts[0], parts[2], parts[3])
        root = int(parts[3][automaton.ROOT])
        corpus: list[list[int]] = []
        mine, state, length = [], root, 0
        for _ in range(3):
            automaton.start_text(parts[3], root)
            corpus.append([])
            for _ in range(rnd.randint(1, 12)):
                corpus[-1].append(rnd.randrange(3))
                automaton.append_shared(*parts, corpus[-1][-1])
            for _ in range(6):
                mine.append(rnd.randrange(3))
                state, length = automaton.advance(*parts, root, state, length, mine[-1])
                known = {tuple(t[i:j]) for t in corpus for i in range(len(t)) for j in range(i + 1, len(t) + 1)}
                best = max((k for k in range(1, len(mine) + 1) if tuple(mine[-k:]) in known), default=0)
                # a match may have become longer through a text added since: the cursor is a lower bound
                assert length <= best
                assert length == 0 or tuple(mine[-length:]) in known


def test_roots_do_not_see_each_other():
    """Texts under two roots of one automaton: a cursor from one root never reaches the other's."""
    parts = automaton.arrays(40)
    automaton.clear(parts[0], parts[2], parts[3])
    first, second = automaton.new_root(parts[0], parts[3]), automaton.new_root(parts[0], parts[3])
    automaton.start_text(parts[3], first)
    for token in (1, 2, 3):
        automaton.append_shared(*parts, token)
    assert automaton.advance(*parts, first, first, 0, 1)[1] == 1
    assert automaton.advance(*parts, second, second, 0, 1)[1] == 0


@pytest.mark.parametrize("kind", ["random", "zipf", "periodic"])
def test_a_million_tokens(kind):
    """Within the memory that was set aside, and as fast at the end as at the beginning (within a factor of six)."""
    import time

    @njit(nogil=True)
    def feed(states, edges, table, meta, tokens):
        for token in tokens:
            automaton.append(states, edges, table, meta, token)

    rng = np.random.default_rng(0)
    count = 1_000_000
    text = {
        "random": lambda: rng.integers(0, 49152, count),
        "zipf": lambda: np.minimum(rng.zipf(1.3, count), 49151),
        "periodic": lambda: np.tile(rng.integers(0, 50, 1000), count // 1000),
    }[kind]().astype(np.int32)
    parts = automaton.arrays(count)
    automaton.clear(parts[0], parts[2], parts[3])
    feed(*parts, text[:1000])
    times = []
    for start in range(1000, count, 99_900):
        began = time.process_time()
        feed(*parts, text[start : start + 99_900])
        times.append(time.process_time() - began)
    assert parts[3][SIZE] == count
    assert parts[3][STATES] <= 2 * count
    assert min(times[-3:]) < 6 * max(times[:3])
