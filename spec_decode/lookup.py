"""One step of the look-up drafters, for all requests, compiled by numba: take in verified tokens, keep score, propose.

An *arm* is a way to continue the text: ARMS below. All of them read the same automata: a request's own, and, if texts
are shared, two generations of finished outputs; when the younger generation is full, the older one is dropped.

With a hedge the arm is not the one with the longest match but the one with the largest NormalHedge weight: every
verified token scores all arms first.

`local` is the tuple (states, edges, table, meta, text [P, C] int32, slot [P, 13] int64), `shared` is
(states, edges, table, meta, text [2, C'] int32, head [2] int64); the first four are the arrays of `automaton`.
"""

from __future__ import annotations

import types

import numpy as np
from numba import njit

from vllm_ext.spec_decode import automaton, normal_hedge
from vllm_ext.spec_decode.automaton import (
    EDGES,
    FIRST,
    LAST,
    LENGTH,
    LINK,
    RECENT,
    SIZE,
    STATES,
    TARGET,
    advance,
    append,
    append_shared,
    clear,
    find,
    new_root,
    start_text,
)
from vllm_ext.spec_decode.code_cache import entry

ARMS = ("longest", "first", "ngram", "shared", "model")
LONGEST, EARLIEST, NGRAM, SHARED, MODEL = range(5)
"""Longest suffix at its most recent occurrence, at its first; a short suffix, most recent; finished outputs; a draft
model, which is only scored and counted here."""

TAKEN, PROMPT, TENANT, ARM, HITS = range(5)
CURSOR = 5
"""Slot fields: tokens taken in, prompt length, tenant, arm and match of the last proposal; then for each generation a
cursor (epoch, root, state, length)."""
WARM = 128
"""Tokens at the end of a text with which a cursor into a new generation starts."""

_weights = njit(nogil=True)(normal_hedge.weights)
_push = njit(nogil=True)(
    types.FunctionType(normal_hedge.push.__code__, vars(normal_hedge) | {"weights": _weights}, "push")
)
_leader = njit(nogil=True)(normal_hedge.leader)


@njit(nogil=True)
def _remember(local, p, token):
    states, edges, table, meta, text = local[0][p], local[1][p], local[2][p], local[3][p], local[4][p]
    if meta[SIZE] == text.shape[0]:
        keep = text.shape[0] // 2
        text[:keep] = text[text.shape[0] - keep :].copy()
        clear(states, table, meta)
        for i in range(keep):
            append(states, edges, table, meta, text[i])
    text[meta[SIZE]] = token
    append(states, edges, table, meta, token)
    local[5][p, TAKEN] += 1


@entry
def ingest(local, p, tokens, prompt, tenant):
    """A new request in slot p with the tokens known so far, `prompt` of them its prompt."""
    slot = local[5][p]
    slot[:] = 0
    slot[PROMPT], slot[TENANT] = prompt, tenant
    slot[CURSOR] = slot[CURSOR + 4] = -1
    clear(local[0][p], local[2][p], local[3][p])
    for token in tokens[max(0, tokens.shape[0] - local[4].shape[1]) :]:
        _remember(local, p, token)
    slot[TAKEN] = tokens.shape[0]


@njit(nogil=True)
def record(local, shared, p):
    """The output of slot p's request becomes a text of its tenant."""
    slot, size, text = local[5][p], local[3][p, SIZE], local[4][p]
    count = min(slot[TAKEN] - slot[PROMPT], size)
    head = shared[5]
    room = shared[4].shape[1]
    if count < 2 or 2 * count + 4 > room:
        return
    g = head[0]
    meta = shared[3][g]
    full = meta[SIZE] + count + 1 > room or meta[STATES] + 2 * count + 2 > shared[0].shape[2]
    if full or meta[EDGES] + 3 * count + 2 > shared[1].shape[2]:
        g = 1 - g
        head[0], head[1] = g, head[1] + 1
        clear(shared[0][g], shared[2][g], shared[3][g])
    states, edges, table, meta = shared[0][g], shared[1][g], shared[2][g], shared[3][g]
    tenant = find(edges, table, meta, 0, slot[TENANT])
    if tenant < 0:
        root = new_root(states, meta)
        automaton._connect(states, edges, table, meta, 0, slot[TENANT], root)
    else:
        root = edges[TARGET, tenant]
    start_text(meta, root)
    for token in text[size - count : size]:
        shared[4][g, meta[SIZE]] = token
        append_shared(states, edges, table, meta, token)
    shared[4][g, meta[SIZE]] = -1
    meta[SIZE] += 1


@njit(nogil=True)
def _open_cursor(local, shared, p, g, epoch):
    """Cursor of slot p into generation g, warmed up with the end of its text; False if the tenant has no text there."""
    states, edges, table, meta = shared[0][g], shared[1][g], shared[2][g], shared[3][g]
    edge = find(edges, table, meta, 0, local[5][p, TENANT])
    if edge < 0:
        return False
    root = np.int64(edges[TARGET, edge])
    state, length, size = root, np.int64(0), local[3][p, SIZE]
    for token in local[4][p][max(0, size - WARM) : size]:
        state, length = advance(states, edges, table, meta, root, state, length, token)
    at = CURSOR + 4 * g
    slot = local[5][p]
    slot[at], slot[at + 1], slot[at + 2], slot[at + 3] = epoch, root, state, length
    return True


@njit(nogil=True)
def _follow(local, shared, p, token):
    """Cursors of slot p after one more verified token (already in its text)."""
    for g in range(2):
        at, slot = CURSOR + 4 * g, local[5][p]
        epoch = shared[5][1] - (g != shared[5][0])
        if slot[at] != epoch:
            _open_cursor(local, shared, p, g, epoch)
        else:
            slot[at + 2], slot[at + 3] = advance(
                shared[0][g], shared[1][g], shared[2][g], shared[3][g], slot[at + 1], slot[at + 2], slot[at + 3], token
            )


@njit(nogil=True)
def look_up(local, shared, p, arm, ngram):
    """(source, end, length) of an arm's continuation of slot p: source -1 = own text, 0 or 1 = a generation."""
    if arm == MODEL:
        return -1, np.int64(0), np.int64(0)
    if arm == SHARED:
        best, source, end = np.int64(0), -1, np.int64(0)
        for g in range(2):
            at, slot = CURSOR + 4 * g, local[5][p]
            if slot[at] == shared[5][1] - (g != shared[5][0]) and slot[at + 3] > best:
                recent = np.int64(shared[0][g, RECENT, slot[at + 2]])
                if shared[4][g, recent] < 0:  # it ends a text: the first occurrence may go on
                    recent = np.int64(shared[0][g, FIRST, slot[at + 2]])
                if shared[4][g, recent] >= 0:
                    best, source, end = slot[at + 3], g, recent
        return source, end, best
    states, meta = local[0][p], local[3][p]
    state = states[LINK, meta[LAST]]
    if state < 0 or meta[SIZE] == 0:
        return -1, np.int64(0), np.int64(0)
    length = np.int64(states[LENGTH, state])
    if arm == NGRAM:
        while length > ngram and states[LENGTH, states[LINK, state]] >= ngram:
            state = states[LINK, state]
        length = min(length, ngram)
    end = np.int64(states[FIRST if arm == EARLIEST else RECENT, state])
    return -1, end, length


@njit(nogil=True)
def continuation(local, shared, p, source, end, out):
    """The tokens after `end` of a source into `out`, padded with the last one; returns how many there are."""
    if source < 0:
        automaton.copy_after(local[4][p], local[3][p, SIZE], end, out)
        return out.shape[0]
    count = 0
    text = shared[4][source]
    while count < out.shape[0] and text[end + count] >= 0:
        out[count] = text[end + count]
        count += 1
    out[count:] = out[max(count - 1, 0)]
    return count


@njit(nogil=True)
def choose(local, shared, p, arms, ngram, handicap, min_match):
    """(arm, source, end, length) of the arm with the longest match; a shared one must be `handicap` tokens longer."""
    best, chosen, source, end, length = np.int64(-1), -1, -1, np.int64(0), np.int64(0)
    for arm in arms:
        s, e, n = look_up(local, shared, p, arm, ngram)
        worth = n - handicap if arm == SHARED else n
        if n >= min_match and n > 0 and worth > best:
            best, chosen, source, end, length = worth, arm, s, e, n
    return chosen, source, end, length


@njit(nogil=True)
def _score(local, shared, settings, arms, hedge, p, token, judged):
    """Score all arms on the next verified token, before it is taken in: would they have drafted it?

    `judged` is the draft model's answer, -1 if it was not asked: then the token scores nobody.
    """
    floats, ints, cost, acceptance = hedge
    if settings[5] > 0 and judged < 0:
        return
    for a in range(arms.shape[0]):
        source, end, length = look_up(local, shared, p, arms[a], settings[0])
        known = length > 0 and length >= settings[2]
        guess = np.int32(-1)
        if known:
            guess = local[4][p, end] if source < 0 else shared[4][source, end]
        acceptance[a] = 1.0 if known and guess == token else 0.0
        if arms[a] == MODEL:
            acceptance[a] = float(judged)
    _push(acceptance, cost, floats[p], ints[p], arms.shape[0], settings[4])


@njit(nogil=True)
def _pick(local, shared, settings, arms, hedge, p):
    """As `choose`; the arm with the largest weight, if it has something to say."""
    arm = arms[_leader(hedge[0][p], arms.shape[0])]
    if arm == MODEL:
        return -1, -1, np.int64(0), np.int64(0)
    source, end, length = look_up(local, shared, p, arm, settings[0])
    if length > 0 and length >= settings[2]:
        return arm, source, end, length
    return choose(local, shared, p, arms, settings[0], settings[1], settings[2])


@njit(nogil=True)
def _count(counters, arm, verified, accepted):
    """Add a verification to the counters [arms, 3 + K]: steps, drafted, accepted, then accepted by position."""
    counters[arm, 0] += 1
    counters[arm, 1] += verified
    counters[arm, 2] += accepted
    counters[arm, 3 : 3 + accepted] += 1


@entry
def step(local, shared, settings, arms, hedge, requests, tokens, judged, drafts, matched, counters):
    """One step.

    Args:
        settings: [6] int64: n-gram length, handicap of shared texts, shortest match, whether texts are shared, horizon
            of the hedge (0 = longest match), whether a model drafts where no look-up does.
        arms: [A] int64, the arms that may be used.
        hedge: state of `normal_hedge` by slot (floats [P, F], ints [P, I]), cost [A] and scratch [A], float64.
        requests: [R, 5] int64: slot, row of `tokens`, verified length (0 = nothing was sampled), drafts verified in
            this step, slot to record before it (-1 = none).
        tokens: [rows, length] int32.
        judged: [R, J] int32: whether the model would have drafted the newly verified tokens (1, 0; -1 = not asked).
        drafts: [R, K] int64 and matched: [R] int32, written.
        counters: [len(ARMS), 3 + K] int64, added to.
    """
    share = settings[3] > 0
    for r in range(requests.shape[0]):
        p, row, length, verified, retired = requests[r]
        if retired >= 0 and share:
            record(local, shared, retired)
        matched[r] = 0
        if p < 0 or length == 0:
            drafts[r] = 0
            continue
        slot = local[5][p]
        if length < slot[TAKEN]:  # the request was set back
            ingest(local, p, tokens[row, :length].copy(), slot[PROMPT], slot[TENANT])
        fresh = length - slot[TAKEN]
        if verified > 0 and slot[HITS] > 0 and fresh > 0:
            _count(counters, slot[ARM], verified, min(fresh - 1, verified))
        start = slot[TAKEN]
        for i in range(start, length):
            if settings[4] > 0 and i >= slot[PROMPT]:
                bit = judged[r, i - start] if i - start < judged.shape[1] else np.int32(-1)
                _score(local, shared, settings, arms, hedge, p, tokens[row, i], bit)
            _remember(local, p, tokens[row, i])
            if share:
                _follow(local, shared, p, tokens[row, i])
        if settings[4] > 0:
            arm, source, end, hits = _pick(local, shared, settings, arms, hedge, p)
        else:
            arm, source, end, hits = choose(local, shared, p, arms, settings[0], settings[1], settings[2])
        if arm < 0:
            drafts[r] = tokens[row, length - 1]
        else:
            continuation(local, shared, p, source, end, drafts[r])
        matched[r] = hits
        slot[ARM], slot[HITS] = arm, hits
        if arm < 0 and settings[5] > 0:
            slot[ARM], slot[HITS] = MODEL, 1
