"""The gate of SeerAttention-R: gate queries of a decode step, gate keys of completed pages.

Specification: `reference_gate.queries` and `reference_gate.page_record`. The cache holds rotated keys; both undo the
rotation from a table. Output channels are expected in the order of `paired`, so that a rotation turns channel c with
channel c + E / 2; scores are products of two such vectors and do not notice the order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.reference_gate import EPS

CHANNELS = 64
"""Channels of a head that are loaded at once."""
TOKENS = 32
"""Keys of a page that are loaded at once."""


@triton.jit
def _unrotated(X, at, ok, position, c, TABLE, table_row, ROT: tl.constexpr):
    """x [rows, channels] at `at + c` before the rotation to `position` [rows]; TABLE [positions, cos | sin]."""
    HALF: tl.constexpr = ROT // 2
    x = tl.load(X + at[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
    low = c < HALF
    turns = c < ROT
    partner = tl.where(low, c + HALF, tl.where(turns, c - HALF, c))
    y = tl.load(X + at[:, None] + partner[None, :], mask=ok, other=0.0).to(tl.float32)
    pair = tl.where(low, c, tl.where(turns, c - HALF, 0))
    t = TABLE + position[:, None] * table_row + pair[None, :]
    known = ok & turns[None, :]
    cos = tl.load(t, mask=known, other=1.0)
    sin = tl.load(t + HALF, mask=known, other=0.0)
    return x * cos + tl.where(low[None, :], y, -y) * sin


@triton.jit
def _gate_query(
    Q, WQ, QN, OUT, TABLE, GATE, SEQ, START, tile, head, requests, q_tok, q_head, o_tok, o_head, table_row, gate_row,
    eps,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Gate queries of ROWS / M requests and one KV head."""
    row = tl.arange(0, ROWS)
    rd = tl.arange(0, BD)
    re = tl.arange(0, E)
    r = tile * (ROWS // M) + row // M
    t = row % M
    known = (r < requests) & (row < ROWS // M * M)
    n = tl.load(SEQ + r, mask=known, other=0)
    q0 = tl.load(START + r, mask=known, other=0)
    m = tl.load(START + r + 1, mask=known, other=0) - q0
    live = known & (t < m) & (n > 0)
    position = tl.where(live, n - m + t, 0)
    token = tl.where(live, q0 + t, 0).to(tl.int64)
    acc = tl.zeros([ROWS, E], tl.float32)
    CHUNKS: tl.constexpr = (D + BD - 1) // BD
    for step in range(0, G * CHUNKS):
        i = step // CHUNKS
        c = step % CHUNKS * BD + rd
        at = token * q_tok + (head * G + i) * q_head
        ok = live[:, None] & (c < D)[None, :]
        x = _unrotated(Q, at, ok, position, c, TABLE, table_row, ROT)
        w = tl.load(WQ + ((head * G + i) * D + c)[:, None] * E + re[None, :], mask=(c < D)[:, None], other=0.0)
        acc = tl.dot(x.to(w.dtype), w, acc, input_precision="ieee")
    norm = tl.rsqrt(tl.sum(acc * acc, 1) / E + eps)
    acc = acc * norm[:, None] * tl.load(QN + re)[None, :].to(tl.float32)
    a, b = tl.split(tl.permute(tl.reshape(acc, [ROWS, 2, E // 2]), [0, 2, 1]))
    half = tl.arange(0, E // 2)
    g = GATE + position[:, None] * gate_row + half[None, :]
    cos = tl.load(g)
    sin = tl.load(g + E // 2)
    to = OUT + token[:, None] * o_tok + head * o_head + half[None, :]
    tl.store(to, (a * cos - b * sin).to(OUT.dtype.element_ty), mask=live[:, None])
    tl.store(to + E // 2, (b * cos + a * sin).to(OUT.dtype.element_ty), mask=live[:, None])


@triton.jit
def _gate_record(
    K, INDEX, WK, KN, TABLE, GATE, page, head, first, k_page, k_head, k_tok, i_page, i_head, table_row, gate_row, eps,
    P: tl.constexpr, D: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the gate key of one full page, whose first token is at position `first`."""
    rp = tl.arange(0, BP)
    rd = tl.arange(0, BD)
    re = tl.arange(0, E)
    base = page * k_page + head * k_head
    acc = tl.zeros([E], tl.float32)
    for c0 in tl.static_range(0, D, BD):
        c = c0 + rd
        top = tl.full([BD], float("-inf"), tl.float32)
        low = tl.full([BD], float("inf"), tl.float32)
        total = tl.zeros([BD], tl.float32)
        for p0 in range(0, P, BP):
            ok = ((p0 + rp) < P)[:, None] & (c < D)[None, :]
            at = base + (p0 + rp) * k_tok
            x = _unrotated(K, at, ok, first + p0 + rp, c, TABLE, table_row, ROT)
            top = tl.maximum(top, tl.max(x, 0))
            low = tl.minimum(low, tl.min(x, 0))
            total += tl.sum(x, 0)
        w = WK + (head * 3 * D + c)[:, None] * E + re[None, :]
        row = (c < D)[:, None]
        acc += tl.sum(top[:, None] * tl.load(w, mask=row, other=0.0).to(tl.float32), 0)
        acc += tl.sum(low[:, None] * tl.load(w + D * E, mask=row, other=0.0).to(tl.float32), 0)
        acc += tl.sum((total / P)[:, None] * tl.load(w + 2 * D * E, mask=row, other=0.0).to(tl.float32), 0)
    acc = acc * tl.rsqrt(tl.sum(acc * acc, 0) / E + eps) * tl.load(KN + re).to(tl.float32)
    a, b = tl.split(tl.permute(tl.reshape(acc, [2, E // 2]), [1, 0]))
    half = tl.arange(0, E // 2)
    g = GATE + first * gate_row + half
    cos = tl.load(g)
    sin = tl.load(g + E // 2)
    to = INDEX + page * i_page + head * i_head + half
    tl.store(to, (a * cos - b * sin).to(INDEX.dtype.element_ty))
    tl.store(to + E // 2, (b * cos + a * sin).to(INDEX.dtype.element_ty))


@triton.jit
def _request_of(START, token, requests):
    """The request that a token of the step belongs to, by bisection."""
    low = token * 0
    high = low + requests
    while high - low > 1:
        middle = (low + high) // 2
        inside = tl.load(START + middle) <= token
        low = tl.where(inside, middle, low)
        high = tl.where(inside, high, middle)
    return low


@triton.jit(do_not_specialize=["tiles", "requests"], do_not_specialize_on_alignment=["SEQ", "START", "SLOTS"])
def _gate_step(
    Q, K, INDEX, WQ, WK, QN, KN, OUT, TABLE, GATE, SEQ, START, SLOTS, tiles, requests, q_tok, q_head, o_tok, o_head,
    k_page, k_head, k_tok, i_page, i_head, table_row, gate_row, eps,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Programs below `tiles` project queries; every other one looks at a token and writes the page it completes."""
    head = tl.program_id(1)
    if tl.program_id(0) < tiles:
        _gate_query(
            Q, WQ, QN, OUT, TABLE, GATE, SEQ, START, tl.program_id(0), head, requests, q_tok, q_head, o_tok, o_head,
            table_row, gate_row, eps, G, D, E, ROT, M, ROWS, BD,
        )  # fmt: skip
    else:
        token = tl.program_id(0) - tiles
        slot = tl.load(SLOTS + token).to(tl.int64)
        if slot >= 0 and slot % P == P - 1:
            r = _request_of(START, token, requests)
            first = tl.load(SEQ + r) - tl.load(START + r + 1) + token - (P - 1)
            _gate_record(
                K, INDEX, WK, KN, TABLE, GATE, slot // P, head, first, k_page, k_head, k_tok, i_page, i_head,
                table_row, gate_row, eps, P, D, E, ROT, BD, BP,
            )  # fmt: skip


def paired(width: int, turning: int) -> Tensor:
    """Order of gate channels that puts the partners c and c + turning / 2 half the width apart: [width] int64."""
    half, rest = turning // 2, (width - turning) // 2
    first = [*range(half), *range(turning, turning + rest)]
    return torch.tensor([*first, *range(half, turning), *range(turning + rest, width)])


def table(inv_freq: Tensor, positions: int, half: int) -> Tensor:
    """cos | sin of every position, [positions, 2 * half] fp32; pairs beyond those of inv_freq do not turn."""
    angle = torch.arange(positions, device=inv_freq.device)[:, None].float() * inv_freq.float()
    angle = torch.nn.functional.pad(angle, (0, half - inv_freq.numel()))
    return torch.cat([angle.cos(), angle.sin()], 1).contiguous()


def gate_step(
    q: Tensor | None, k_cache: Tensor, index: Tensor, wq: Tensor, wk: Tensor, q_norm: Tensor, k_norm: Tensor,
    out: Tensor | None, rope: Tensor, gate_rope: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    slot_mapping: Tensor, *, max_query_len: int,
) -> None:  # fmt: skip
    """Gate queries of a step into `out` [T, H, E], and the records of the pages that its tokens complete.

    Args:
        q: [T, Hq, D]; None = only records (prompt rows), and `out` is not used.
        index: [num_pages, H, K, D] view, E elements of it are written.
        wq [H, g * D, E], wk [H, 3 * D, E], q_norm, k_norm [E]: channels in the order of `paired`.
        rope [positions, rot], gate_rope [positions, E]: see `table`.
        max_query_len: most tokens of a request; a constant of the captured graph where q is given.
    """
    requests, heads, tokens = seq_lens.shape[0], k_cache.shape[1], slot_mapping.shape[0]
    d, page, width = k_cache.shape[3], k_cache.shape[2], wk.shape[2]
    m = max_query_len if q is not None else 1
    rows = max(16, triton.next_power_of_2(m))
    tiles = triton.cdiv(requests, rows // m) if q is not None else 0
    source, to = (k_cache, index) if q is None or out is None else (q, out)
    if not tokens:
        return
    _gate_step[(tiles + tokens, heads)](
        source, k_cache, index, wq, wk, q_norm, k_norm, to, rope, gate_rope, seq_lens, query_start_loc, slot_mapping,
        tiles, requests, source.stride(0), source.stride(1), to.stride(0), to.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), index.stride(0), index.stride(1),
        rope.stride(0), gate_rope.stride(0), EPS,
        G=wq.shape[1] // d, D=d, E=width, ROT=rope.shape[1], P=page, M=m, ROWS=rows,
        BD=min(CHANNELS, triton.next_power_of_2(d)), BP=min(TOKENS, page), num_warps=4,
    )  # fmt: skip


@triton.jit
def _threshold(
    SC, IDS, PAGES, COUNTS, STATS, SEQ, START, SLOTS, threshold, sink, local, np_cap, capacity,
    H: tl.constexpr, P: tl.constexpr, NB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    r = pair // H
    count = tl.load(COUNTS + pair)
    if count <= 0:
        return
    n = tl.load(SEQ + r)
    q0 = tl.load(START + r)
    m = tl.load(START + r + 1) - q0
    pages = tl.cdiv(n, P)
    first = tl.minimum(sink, pages)
    last = tl.maximum(0, tl.minimum(pages - local, (n - m) // P))
    every = tl.arange(0, NB)
    s = tl.load(SC + pair * np_cap + every, mask=every < n // P, other=float("-inf"))
    top = tl.max(s, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.maximum(tl.sum(tl.exp(s - top), 0), 1e-30)
    j = tl.arange(0, CB)
    ids = tl.load(IDS + pair * capacity + j, mask=j < count, other=0)
    phys = tl.load(PAGES + pair * capacity + j, mask=j < count, other=0)
    mine = tl.load(SC + pair * np_cap + ids, mask=(j < count) & (ids < n // P), other=float("-inf"))
    keep = (j < count) & ((tl.exp(mine - top) / total > threshold) | (ids < first) | (ids >= last))
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    kept = tl.sum(keep.to(tl.int32), 0)
    tl.debug_barrier()  # the list is shortened in place: every entry is read before one is written
    tl.store(IDS + pair * capacity + place, ids, mask=keep)
    tl.store(PAGES + pair * capacity + place, phys, mask=keep)
    tl.store(IDS + pair * capacity + j, -1, mask=(j >= kept) & (j < capacity))
    tl.store(COUNTS + pair, kept)
    if tl.load(SLOTS + q0) >= 0:
        tl.atomic_add(STATS, ((kept - count) * P).to(tl.int64), sem="relaxed")
        tl.atomic_add(STATS + 3, (kept - count).to(tl.int64), sem="relaxed")


def drop_below(
    scores: Tensor, ids: Tensor, pages: Tensor, counts: Tensor, stats: Tensor, seq_lens: Tensor,
    query_start_loc: Tensor, slot_mapping: Tensor, *, page: int, threshold: float, sink: int, local: int,
) -> None:  # fmt: skip
    """Shorten lists in place to the pages whose share of softmax(scores) exceeds `threshold`, and the forced ones.

    Specification: `reference_gate.above_threshold`. scores [R, H, 1, N] as `score_select` leaves them; ids, pages
    [R, H, C], counts [R, H] its lists; `stats` is corrected.
    """
    requests, heads, capacity = ids.shape
    np_cap = scores.shape[3]
    _threshold[(requests * heads,)](
        scores, ids, pages, counts, stats, seq_lens, query_start_loc, slot_mapping, threshold, sink, local, np_cap,
        capacity, H=heads, P=page, NB=triton.next_power_of_2(np_cap), CB=triton.next_power_of_2(capacity), num_warps=4,
    )  # fmt: skip
