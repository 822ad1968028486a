"""Suffix automaton of a growing text, in flat arrays, compiled by numba (Blumer et al., 1985; SAM-Decoding, 2024).

An automaton lives in four arrays, so that thousands of them need no Python objects and no lock:

    states [5, S] int32   rows LINK, LENGTH, FIRST, RECENT, HEAD: suffix link, longest string, ends of the first and
                          of a recent occurrence (text positions, exclusive), first edge of the state
    edges [4, E] int32    rows SOURCE, TOKEN, TARGET, NEXT: the table finds an edge, NEXT chains a state's edges
    table [H] int32       hash of (SOURCE, TOKEN) -> edge, -1 = empty; the first `meta[MASK] + 1` entries are in use
    meta [6] int64        counts of states and edges, the state of the whole text, its length, hash mask, root

A text of n tokens makes at most 2 n states and 3 n edges. Several texts may share the arrays, each under a root of its
own: states of one root are never reached from another. Appending costs O(1) amortised.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from vllm_ext.spec_decode.code_cache import entry

LINK, LENGTH, FIRST, RECENT, HEAD = range(5)
SOURCE, TOKEN, TARGET, NEXT = range(4)
STATES, EDGES, LAST, SIZE, MASK, ROOT = range(6)
MIN_TABLE = 64
CLIMB = 32
"""How many suffix links a step follows to refresh recent ends; beyond it they stay valid, only older."""


def arrays(tokens: int, lead: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Zeroed arrays for automata of up to `tokens` tokens (and as many roots); memory is touched as they fill.

    `lead` puts dimensions in front, e.g. one for slots. About 130 bytes a token when full.
    """
    hashed = 1 << int(np.ceil(np.log2(max(4 * tokens, MIN_TABLE))))
    return (
        np.zeros((*lead, 5, 2 * tokens + 2), np.int32),
        np.zeros((*lead, 4, 3 * tokens + 2), np.int32),
        np.zeros((*lead, hashed), np.int32),
        np.zeros((*lead, 6), np.int64),
    )


@njit(nogil=True)
def _slot_of(source, token, mask):
    """First place of an edge in the table."""
    x = (np.uint64(source) << np.uint64(32)) ^ np.uint64(np.uint32(token))
    x = (x ^ (x >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((x ^ (x >> np.uint64(29))) & np.uint64(mask))


@njit(nogil=True)
def find(edges, table, meta, state, token):
    """The edge of `state` on `token`, or -1."""
    mask = meta[MASK]
    at = _slot_of(state, token, mask)
    while True:
        edge = table[at]
        if edge < 0 or (edges[SOURCE, edge] == state and edges[TOKEN, edge] == token):
            return edge
        at = (at + 1) & mask


@njit(nogil=True)
def _place(edges, table, mask, edge):
    at = _slot_of(edges[SOURCE, edge], edges[TOKEN, edge], mask)
    while table[at] >= 0:
        at = (at + 1) & mask
    table[at] = edge


@njit(nogil=True)
def _connect(states, edges, table, meta, state, token, target):
    """A new edge; doubles the part of the table in use when it is half full."""
    edge = meta[EDGES]
    meta[EDGES] = edge + 1
    edges[SOURCE, edge] = state
    edges[TOKEN, edge] = token
    edges[TARGET, edge] = target
    edges[NEXT, edge] = states[HEAD, state]
    states[HEAD, state] = edge
    if 2 * (edge + 1) > meta[MASK] + 1 and 2 * (meta[MASK] + 1) <= table.shape[0]:
        meta[MASK] = 2 * meta[MASK] + 1
        table[: meta[MASK] + 1] = -1
        for e in range(edge + 1):
            _place(edges, table, meta[MASK], e)
    else:
        _place(edges, table, meta[MASK], edge)


@njit(nogil=True)
def _new_state(states, meta, length, end):
    state = meta[STATES]
    meta[STATES] = state + 1
    states[LINK, state] = -1
    states[LENGTH, state] = length
    states[FIRST, state] = end
    states[RECENT, state] = end
    states[HEAD, state] = -1
    return state


@entry
def clear(states, table, meta):
    """An empty automaton with one root."""
    meta[:] = 0
    meta[MASK] = MIN_TABLE - 1
    table[:MIN_TABLE] = -1
    meta[ROOT] = _new_state(states, meta, 0, 0)
    meta[LAST] = meta[ROOT]


@njit(nogil=True)
def new_root(states, meta):
    """Another root, for texts that the others must not see."""
    return _new_state(states, meta, 0, 0)


@njit(nogil=True)
def has_room(states, edges, tokens):
    """Whether arrays of these shapes hold `tokens` more tokens than `tokens` says (worst case)."""
    return 2 * tokens + 2 <= states.shape[1] and 3 * tokens + 2 <= edges.shape[1]


@njit(nogil=True)
def _split(states, edges, table, meta, parent, token, target):
    """A copy of `target` for the strings one longer than those of `parent`; edges on the path are redirected."""
    twin = _new_state(states, meta, states[LENGTH, parent] + 1, states[FIRST, target])
    states[LINK, twin] = states[LINK, target]
    states[RECENT, twin] = states[RECENT, target]
    edge = states[HEAD, target]
    while edge >= 0:
        _connect(states, edges, table, meta, twin, edges[TOKEN, edge], edges[TARGET, edge])
        edge = edges[NEXT, edge]
    states[LINK, target] = twin
    while parent >= 0:
        edge = find(edges, table, meta, parent, token)
        if edge < 0 or edges[TARGET, edge] != target:
            break
        edges[TARGET, edge] = twin
        parent = states[LINK, parent]
    return twin


@njit(nogil=True)
def append(states, edges, table, meta, token):
    """The text grows by `token`. The state of the longest suffix that occurs earlier is then `link[meta[LAST]]`."""
    end = meta[SIZE] + 1
    meta[SIZE] = end
    old = states[LINK, meta[LAST]]
    for _ in range(CLIMB):  # what matched before this token has now been seen to end at the old end of the text
        if old < 0:
            break
        states[RECENT, old] = end - 1
        old = states[LINK, old]
    state = _new_state(states, meta, states[LENGTH, meta[LAST]] + 1, end)
    walk, edge = meta[LAST], np.int32(-1)
    while walk >= 0:
        edge = find(edges, table, meta, walk, token)
        if edge >= 0:
            break
        _connect(states, edges, table, meta, walk, token, state)
        walk = states[LINK, walk]
    if walk < 0:
        states[LINK, state] = meta[ROOT]
    else:
        target = edges[TARGET, edge]
        if states[LENGTH, target] != states[LENGTH, walk] + 1:
            target = _split(states, edges, table, meta, walk, token, target)
        states[LINK, state] = target
    meta[LAST] = state


@njit(nogil=True)
def start_text(meta, root):
    """The next tokens begin another text under `root`; no string spans both texts."""
    meta[LAST] = root
    meta[ROOT] = root


@njit(nogil=True)
def append_shared(states, edges, table, meta, token):
    """`append` where an earlier text of the root may begin the same (generalised automaton)."""
    last = meta[LAST]
    edge = find(edges, table, meta, last, token)
    if edge < 0:
        append(states, edges, table, meta, token)
        return
    meta[SIZE] += 1
    target = edges[TARGET, edge]
    if states[LENGTH, target] != states[LENGTH, last] + 1:
        target = _split(states, edges, table, meta, last, token, target)
    states[RECENT, target] = meta[SIZE]
    meta[LAST] = target


@njit(nogil=True)
def advance(states, edges, table, meta, root, state, length, token):
    """Cursor over a text that another one is compared with: (state, length) of its longest suffix that occurs here."""
    while state != root and length <= states[LENGTH, states[LINK, state]]:
        state = states[LINK, state]  # the state was split since
    while True:
        edge = find(edges, table, meta, state, token)
        if edge >= 0:
            return edges[TARGET, edge], length + 1
        if state == root:
            return root, 0
        state = states[LINK, state]
        length = states[LENGTH, state]


@njit(nogil=True)
def copy_after(text, size, end, out):
    """`out` = the tokens after `end` of text[:size], repeated with period `size - end` where the text runs out."""
    period = size - end
    for i in range(out.shape[0]):
        out[i] = text[end + i % period]
