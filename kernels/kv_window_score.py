"""Attention of a window of queries to all resident tokens, reduced per token and never materialised.

Specification: `kv_reference.window_attention` with `weighted_rows` (heads) or `worst_case` (worst). Two passes over K:
the first finds each row's log-sum-exp, the second turns logits into probabilities and reduces them in registers.
Pooling along the tokens reads shifted tiles of K, so no program needs another's columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64
"""Tokens of a tile; a program takes `tiles` of them."""
PROGRAMS = 528
"""Programs of a launch: four for each of the 132 SMs of an H100."""


@triton.jit
def _logits(
    q, K, ROW, head, cols, n, first, visible, wi, k_page, k_head, k_tok, scale, P: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """Scaled logits [ROWS, TILE] of one KV head for resident tokens `cols`; -inf where a row does not see a token."""
    rd = tl.arange(0, DP)
    slot = first + cols
    ok = (cols >= 0) & (cols < n)
    page = tl.load(ROW + slot // P, mask=ok, other=0).to(tl.int64)
    at = page * k_page + head * k_head + (slot % P) * k_tok
    k = tl.load(K + at[None, :] + rd[:, None], mask=ok[None, :] & (rd[:, None] < D), other=0.0)
    s = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
    seen = ok[None, :] & (cols[None, :] < visible + wi[:, None])
    return tl.where(seen, s, float("-inf"))


@triton.jit(do_not_specialize=["n", "first", "visible", "tiles"])
def _rows_lse(
    Q, K, ROW, M, S, n, first, visible, tiles, q_tok, q_head, k_page, k_head, k_tok, scale, G: tl.constexpr,
    W: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    """Partial maximum and sum of each row over the tiles of one program."""
    head, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    rr = tl.arange(0, ROWS)
    rd = tl.arange(0, DP)
    wi = rr % W
    q = tl.load(
        Q + wi[:, None] * q_tok + (head * G + rr // W)[:, None] * q_head + rd[None, :],
        mask=(rr < G * W)[:, None] & (rd < D)[None, :], other=0.0,
    )  # fmt: skip
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for i in range(0, tiles):
        cols = (part * tiles + i) * TN + tl.arange(0, TN)
        s = _logits(q, K, ROW, head, cols, n, first, visible, wi, k_page, k_head, k_tok, scale, P, D, DP)
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(s - safe[:, None]), 1)
        top = new
    tl.store(M + (head * parts + part) * ROWS + rr, top)
    tl.store(S + (head * parts + part) * ROWS + rr, total)


@triton.jit(do_not_specialize=["n", "columns", "first", "visible", "tiles"])
def _reduce_rows(
    Q, K, ROW, LSE, WEIGHTS, OUT, n, columns, first, visible, tiles, q_tok, q_head, k_page, k_head, k_tok, scale,
    G: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TN: tl.constexpr, POOL: tl.constexpr, WORST: tl.constexpr,
):  # fmt: skip
    """WORST: maximum over all rows of the pooled, weighted probabilities; else their weighted sum per query head."""
    head, part = tl.program_id(0), tl.program_id(1)
    rr = tl.arange(0, ROWS)
    rd = tl.arange(0, DP)
    wi = rr % W
    real = rr < G * W
    q = tl.load(
        Q + wi[:, None] * q_tok + (head * G + rr // W)[:, None] * q_head + rd[None, :],
        mask=real[:, None] & (rd < D)[None, :], other=0.0,
    )  # fmt: skip
    lse = tl.load(LSE + head * ROWS + rr)
    weight = tl.load(WEIGHTS + head * ROWS + rr)
    for i in range(0, tiles):
        cols = (part * tiles + i) * TN + tl.arange(0, TN)
        if WORST:
            p = tl.zeros([ROWS, TN], tl.float32)
            for shift in tl.static_range(0, POOL):
                near = cols + shift - POOL // 2
                s = _logits(q, K, ROW, head, near, n, first, visible, wi, k_page, k_head, k_tok, scale, P, D, DP)
                p += tl.where((near < columns)[None, :], tl.exp(s - lse[:, None]), 0.0)
            p = tl.where(real[:, None], p * (weight / POOL)[:, None], 0.0)
            tl.store(OUT + head * columns + cols, tl.max(p, 0), mask=cols < columns)
        else:
            s = _logits(q, K, ROW, head, cols, n, first, visible, wi, k_page, k_head, k_tok, scale, P, D, DP)
            p = tl.where(real[:, None], tl.exp(s - lse[:, None]) * weight[:, None], 0.0)
            for g in tl.static_range(0, G):
                mine = tl.sum(tl.where((rr // W == g)[:, None], p, 0.0), 0)
                tl.store(OUT + (head * G + g) * columns + cols, mine, mask=cols < columns)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


class WindowScore:
    """The window of one request and layer against its resident keys.

    Args:
        queries: [w, Hq, D] of the w newest tokens.
        k_cache: [num_blocks, H, P, D] view, any strides, last axis contiguous.
        row: [blocks] int32 block table.
        first: first resident slot.
        n: resident tokens.
        scale: of the logits.
    """

    def __init__(self, queries: Tensor, k_cache: Tensor, row: Tensor, first: int, n: int, scale: float) -> None:
        (w, hq, d), heads = queries.shape, k_cache.shape[1]
        self.queries, self.keys, self.row, self.n = queries, k_cache, row, n
        self.heads, self.group, self.window, self.rows = heads, hq // heads, w, max(16, _power(hq // heads * w))
        tile = TILE if self.rows <= 128 else TILE // 2  # registers
        tiles = triton.cdiv(n, tile)
        parts = min(tiles, max(1, PROGRAMS // heads))
        self.tiles = triton.cdiv(tiles, parts)
        self.parts = triton.cdiv(tiles, self.tiles)
        self.numbers = (
            first,
            n - w + 1,
            self.tiles,
            queries.stride(0),
            queries.stride(1),
            *k_cache.stride()[:3],
            scale,
        )
        self.sizes = {
            "G": self.group, "W": w, "ROWS": self.rows, "P": k_cache.shape[2], "D": d, "DP": max(16, _power(d)),
            "TN": tile, "num_warps": 8 if self.rows >= 128 else 4, "num_stages": 2,
        }  # fmt: skip
        self.lse = self._lse()

    def _lse(self) -> Tensor:
        """[H, ROWS] fp32."""
        m = torch.empty(self.heads, self.parts, self.rows, dtype=torch.float32, device=self.row.device)
        s = torch.empty_like(m)
        _rows_lse[(self.heads, self.parts)](
            self.queries, self.keys, self.row, m, s, self.n, *self.numbers, **self.sizes
        )
        top = m.amax(1)
        return top + (s * (m - top[:, None]).exp()).sum(1).log()

    def _reduce(self, weights: Tensor, out: Tensor, columns: int, pool: int, worst: bool) -> Tensor:
        _reduce_rows[(self.heads, self.parts)](
            self.queries, self.keys, self.row, self.lse, weights.contiguous(), out, self.n, columns, *self.numbers,
            POOL=pool, WORST=worst, **self.sizes,
        )  # fmt: skip
        return out

    def _padded(self, rows: Tensor) -> Tensor:
        """[H, G * w] -> [H, ROWS]."""
        return torch.nn.functional.pad(rows, (0, self.rows - rows.shape[1]))

    def heads_sum(self, weights: Tensor | None = None) -> Tensor:
        """[Hq, n] fp32: attention summed over the window with `weights` [w], default 1 / w."""
        if weights is None:
            weights = torch.full((self.window,), 1 / self.window, device=self.row.device)
        rows = weights.float().repeat(self.heads, self.group)
        out = torch.empty(self.heads * self.group, self.n, dtype=torch.float32, device=self.row.device)
        return self._reduce(self._padded(rows), out, self.n, 1, False)

    def worst(self, pool: int = 1, columns: int | None = None) -> Tensor:
        """[H, columns] fp32: largest probability over window and group, rows pooled over the columns and rescaled."""
        columns = self.n if columns is None else columns
        out = torch.empty(self.heads, columns, dtype=torch.float32, device=self.row.device)
        rows = self._padded(self._mass_ratio(pool, columns))
        return self._reduce(rows, out, columns, pool, True)

    def _mass_ratio(self, pool: int, columns: int) -> Tensor:
        """[H, G * w]: mass of a row over its mass after pooling. Zero padding loses mass at the two ends only."""
        ones = torch.ones(self.heads, self.group * self.window, device=self.row.device)
        if pool == 1:
            return ones
        half = pool // 2
        ends = [*range(min(half, columns)), *range(max(half, columns - half), columns)]
        lost = [max(0, half - j) + max(0, half - (columns - 1 - j)) for j in ends]
        at = torch.tensor(ends, device=self.row.device)
        slot = self.numbers[0] + at
        keys = self.keys[self.row[slot // self.sizes["P"]].long(), :, slot % self.sizes["P"]]  # [ends, H, D]
        q = self.queries.float().unflatten(1, (self.heads, self.group))
        logits = torch.einsum("whgd,ehd->hgwe", q, keys.float()) * self.numbers[-1]
        hidden = at[None] >= self.numbers[1] + torch.arange(self.window, device=at.device)[:, None]
        p = (logits.masked_fill(hidden, -torch.inf).flatten(1, 2) - self.lse[:, : ones.shape[1], None]).exp()
        missing = (p * torch.tensor(lost, device=at.device)).sum(-1) / pool
        mass = self._mass(columns)
        left = mass - missing
        return torch.where(left > 0, mass / left, ones)

    def _mass(self, columns: int) -> Tensor:
        """[H, G * w] probability of the first `columns` tokens: all, less that of the few behind them."""
        if columns == self.n:
            return torch.ones(self.heads, self.group * self.window, device=self.row.device)
        slot = self.numbers[0] + torch.arange(columns, self.n, device=self.row.device)
        keys = self.keys[self.row[slot // self.sizes["P"]].long(), :, slot % self.sizes["P"]]
        q = self.queries.float().unflatten(1, (self.heads, self.group))
        logits = torch.einsum("whgd,ehd->hgwe", q, keys.float()) * self.numbers[-1]
        at = torch.arange(columns, self.n, device=slot.device)
        hidden = at[None] >= self.numbers[1] + torch.arange(self.window, device=at.device)[:, None]
        p = (logits.masked_fill(hidden, -torch.inf).flatten(1, 2) - self.lse[:, : self.group * self.window, None]).exp()
        return 1 - p.sum(-1)
