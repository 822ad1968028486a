"""Attention of a window of queries to all resident tokens, reduced per token and never materialised.

Specification: `kv_reference.window_attention` with `weighted_rows` (heads), `group_mean` (mean) or `worst_case`
(worst). Two passes over K, each one launch for all layers of several requests: the first finds each row's log-sum-exp,
the second turns logits into probabilities and reduces them in registers. Pooling along the tokens reads shifted tiles
of K, so no program needs another's columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.kv_compact import LayerCaches, _cache_of

TILE = 64
"""Tokens of a tile; a program takes `tiles` of them."""
PROGRAMS = 2112
"""Programs of a launch, if there are so many tiles: sixteen for each of the 132 SMs of an H100."""
HEADS, MEAN, WORST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What `_reduce_rows` gives a token: a sum per query head, their mean, or the largest of all rows."""


@triton.jit
def _logits(q, keys, row, cols, n, visible, wi, k_page, k_tok, scale, P: tl.constexpr, D: tl.constexpr,
            DP: tl.constexpr):  # fmt: skip
    """Scaled logits [ROWS, TILE] of one KV head for resident tokens `cols`; -inf where a row does not see a token."""
    rd = tl.arange(0, DP)
    ok = (cols >= 0) & (cols < n)
    page = tl.load(row + cols // P, mask=ok, other=0).to(tl.int64)
    at = page * k_page + (cols % P) * k_tok
    k = tl.load(keys + at[None, :] + rd[:, None], mask=ok[None, :] & (rd[:, None] < D), other=0.0)
    s = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
    seen = ok[None, :] & (cols[None, :] < visible + wi[:, None])
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _window(Q, entry, head, q_entry, q_tok, q_head, G: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr,
            D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """Queries [ROWS, DP] of one KV head: row g * W + i is query i of the window by head g of the group."""
    rr, rd = tl.arange(0, ROWS), tl.arange(0, DP)
    at = entry * q_entry + (rr % W)[:, None] * q_tok + (head * G + rr // W)[:, None] * q_head
    return tl.load(Q + at + rd[None, :], mask=(rr < G * W)[:, None] & (rd < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["n", "visible", "tiles", "layers", "r_row"])
def _rows_lse(
    Q, PTRS, CACHE, ROWS_OF, LSE, n, visible, tiles, layers, r_row, q_entry, q_tok, q_head, k_page, k_head, k_tok,
    scale, G: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each row over the tiles of one program."""
    head, part, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rr = tl.arange(0, ROWS)
    wi = rr % W
    q = _window(Q, entry, head, q_entry, q_tok, q_head, G, W, ROWS, D, DP)
    keys = _cache_of(PTRS, CACHE, entry % layers, ALIGN) + head * k_head
    row = ROWS_OF + entry // layers * r_row
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for i in range(0, tiles):
        cols = (part * tiles + i) * TN + tl.arange(0, TN)
        s = _logits(q, keys, row, cols, n, visible, wi, k_page, k_tok, scale, P, D, DP)
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(s - safe[:, None]), 1)
        top = new
    found = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(LSE + ((entry * tl.num_programs(0) + head) * tl.num_programs(1) + part) * ROWS + rr, found)


@triton.jit(do_not_specialize=["n", "visible", "tiles", "layers", "r_row", "columns", "w_group"])
def _reduce_rows(
    Q, PTRS, CACHE, ROWS_OF, LSE, WEIGHTS, OUT, n, visible, tiles, layers, r_row, q_entry, q_tok, q_head, k_page,
    k_head, k_tok, scale, columns, w_group, G: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, TN: tl.constexpr, ALIGN: tl.constexpr, POOL: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The weighted probabilities of each token, pooled where KIND is WORST, reduced over the rows."""
    head, part, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = entry * tl.num_programs(0) + head
    rr = tl.arange(0, ROWS)
    wi = rr % W
    real = rr < G * W
    q = _window(Q, entry, head, q_entry, q_tok, q_head, G, W, ROWS, D, DP)
    keys = _cache_of(PTRS, CACHE, entry % layers, ALIGN) + head * k_head
    row = ROWS_OF + entry // layers * r_row
    lse = tl.load(LSE + group * ROWS + rr)
    weight = tl.load(WEIGHTS + group * w_group + rr)
    for i in range(0, tiles):
        cols = (part * tiles + i) * TN + tl.arange(0, TN)
        if KIND == WORST:
            p = tl.zeros([ROWS, TN], tl.float32)
            for shift in tl.static_range(0, POOL):
                near = cols + shift - POOL // 2
                s = _logits(q, keys, row, near, n, visible, wi, k_page, k_tok, scale, P, D, DP)
                p += tl.where((near < columns)[None, :], tl.exp(s - lse[:, None]), 0.0)
            p = tl.where(real[:, None], p * (weight / POOL)[:, None], 0.0)
            tl.store(OUT + group * columns + cols, tl.max(p, 0), mask=cols < columns)
        else:
            s = _logits(q, keys, row, cols, n, visible, wi, k_page, k_tok, scale, P, D, DP)
            p = tl.where(real[:, None], tl.exp(s - lse[:, None]) * weight[:, None], 0.0)
            if KIND == MEAN:
                tl.store(OUT + group * columns + cols, tl.sum(p, 0) / G, mask=cols < columns)
            else:
                for g in tl.static_range(0, G):
                    mine = tl.sum(tl.where((rr // W == g)[:, None], p, 0.0), 0)
                    tl.store(OUT + (group * G + g) * columns + cols, mine, mask=cols < columns)


class WindowScore:
    """The windows of R requests against their resident keys in L layers.

    Args:
        queries: [R * L, w, Hq, D] of the w newest tokens, by request, then by layer.
        keys: views [num_blocks, H, P, D] of the keys.
        rows: [R, blocks] int32, block tables from the first resident block on.
        n: resident tokens of each request.
        scale: of the logits.
        layers: which of `keys`; default all.
    """

    def __init__(
        self, queries: Tensor, keys: LayerCaches, rows: Tensor, n: int, scale: float, layers: range | None = None
    ) -> None:
        (self.entries, w, hq, d), (_, heads, page, _) = queries.shape, keys.like.shape
        self.queries, self.keys, self.table, self.n, self.scale = queries, keys, rows, n, scale
        self.layers, self.pointers = layers, keys.pointers_of(layers)
        self.heads, self.group, self.window = heads, hq // heads, w
        self.rows, self.visible = max(16, triton.next_power_of_2(hq // heads * w)), n - w + 1
        tile = TILE if self.rows <= 128 else TILE // 2  # registers
        tiles = triton.cdiv(n, tile)
        self.tiles = triton.cdiv(tiles, min(tiles, max(1, PROGRAMS // (heads * self.entries))))
        self.grid = (heads, triton.cdiv(tiles, self.tiles), self.entries)
        self.numbers = (
            n, self.visible, self.tiles, len(self.pointers), rows.stride(0), *queries.stride()[:3],
            *keys.like.stride()[:3], scale,
        )  # fmt: skip
        self.sizes = {
            "G": self.group, "W": w, "ROWS": self.rows, "P": page, "D": d, "DP": max(16, triton.next_power_of_2(d)),
            "TN": tile, "ALIGN": keys.align, "num_warps": 8 if self.rows >= 128 else 4, "num_stages": 2,
        }  # fmt: skip
        self.lse = self._lse()

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.table.device)

    def _lse(self) -> Tensor:
        """[R * L, H, ROWS] fp32."""
        parts = self._new(self.entries, self.heads, self.grid[1], self.rows)
        _rows_lse[self.grid](
            self.queries, self.pointers, self.keys.like, self.table, parts, *self.numbers, **self.sizes
        )
        return parts.logsumexp(2)

    def _reduce(self, weights: Tensor, out: Tensor, pool: int, kind: tl.constexpr) -> Tensor:
        """Weights [ROWS] of all, or [R * L, H, ROWS]."""
        _reduce_rows[self.grid](
            self.queries, self.pointers, self.keys.like, self.table, self.lse, weights, out, *self.numbers,
            out.shape[-1], self.rows if weights.dim() > 1 else 0, POOL=pool, KIND=kind.value, **self.sizes,
        )  # fmt: skip
        return out

    def _padded(self, rows: Tensor) -> Tensor:
        """[..., G * w] -> [..., ROWS]."""
        return torch.nn.functional.pad(rows, (0, self.rows - rows.shape[-1])).contiguous()

    def _over_window(self, weights: Tensor | None, out: Tensor, kind: tl.constexpr) -> Tensor:
        if weights is None:
            return self._reduce(self._new(self.rows).fill_(1 / self.window), out, 1, kind)
        return self._reduce(self._padded(weights.float().repeat(self.group)), out, 1, kind)

    def heads_sum(self, weights: Tensor | None = None) -> Tensor:
        """[R * L, Hq, n] fp32: attention summed over the window with `weights` [w], default 1 / w."""
        return self._over_window(weights, self._new(self.entries, self.heads * self.group, self.n), HEADS)

    def mean(self, weights: Tensor | None = None) -> Tensor:
        """[R * L, H, n] fp32: `heads_sum` averaged over the GQA group."""
        return self._over_window(weights, self._new(self.entries, self.heads, self.n), MEAN)

    def worst(self, pool: int = 1, columns: int | None = None) -> Tensor:
        """[R * L, H, columns] fp32: largest probability over window and group, rows pooled and rescaled first."""
        columns = self.n if columns is None else columns
        if pool == 1:
            weights = self._new(self.rows).fill_(1)
        else:
            weights = self._padded(self._mass_ratio(pool, columns))
        return self._reduce(weights, self._new(self.entries, self.heads, columns), pool, WORST)

    def _mass_ratio(self, pool: int, columns: int) -> Tensor:
        """[R * L, H, G * w]: a row's mass over that after pooling; zero padding loses mass at the two ends only."""
        half = pool // 2
        front, back = min(half, columns), max(half, columns - half)
        mass, missing = torch.ones_like(self.lse[..., : self.group * self.window]), 0.0
        for begin, end in ((0, front), (back, self.n)):
            if begin >= end:
                continue
            at = torch.arange(begin, end, device=self.table.device)
            p = self._probabilities(at, begin, end)
            mass = mass - (p * (at >= columns)).sum(-1)
            lost = (half - at).clamp(min=0) + (half - (columns - 1 - at)).clamp(min=0)
            missing = missing + (p * (lost * (at < columns))).sum(-1) / pool
        left = mass - missing
        return torch.where(left > 0, mass / left, 1.0)

    def _probabilities(self, at: Tensor, begin: int, end: int) -> Tensor:
        """[R * L, H, G * w, end - begin] of a few tokens."""
        keys = self.keys.gather(self.table, begin, end, self.layers).float()
        q = self.queries.float().unflatten(2, (self.heads, self.group))
        logits = torch.einsum("xwhgd,xhed->xhgwe", q, keys) * self.scale
        hidden = at[None] >= self.visible + torch.arange(self.window, device=at.device)[:, None]
        p = logits.masked_fill(hidden, -torch.inf).flatten(2, 3)
        return (p - self.lse[:, :, : p.shape[2], None]).exp()
