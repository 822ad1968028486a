"""Plain-PyTorch specification of the expert kernels; also the product on CPUs.

Shapes: T tokens, k experts a token, E experts on this rank, d hidden size, n width of an expert (of this rank).

* `x` [T, d]; `ids` [T, k] integers, global numbers, -1 = skip the pair; `weights` [T, k] fp32.
* `w13` [E, 2n, d]: the gate's rows, then the up projection's; `w2` [E, d, n].
* `expert_map` [global experts] int32: number on this rank, -1 = another rank's expert; None = the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor


def local_ids(ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
    """Expert on this rank for each pair, -1 = skipped; the shape of `ids`, int64."""
    ids = ids.long()
    return ids if expert_map is None else torch.where(ids >= 0, expert_map.long()[ids.clamp_min(0)], -1)


def route(
    ids: Tensor, experts: int, block_m: int, expert_map: Tensor | None = None
) -> tuple[Tensor, Tensor, list[tuple[int, int, int, int]]]:
    """Stable counting sort of the pairs by expert.

    Returns:
        (token [rows], row [T * k], tiles): the token of each row, the row of each pair (-1 = skipped), and for each
        tile of `block_m` rows the expert, the expert's first tile, its number of rows, its first row.
    """
    flat = local_ids(ids, expert_map).flatten()
    order = torch.argsort(torch.where(flat < 0, experts, flat), stable=True)[: int((flat >= 0).sum())]
    row = torch.full_like(flat, -1)
    row[order] = torch.arange(order.numel(), device=ids.device)
    tiles: list[tuple[int, int, int, int]] = []
    first_row = 0
    for e, count in enumerate(torch.bincount(flat[flat >= 0], minlength=experts).tolist()):
        first_tile = len(tiles)
        tiles += [(e, first_tile, count, first_row)] * -(-count // block_m)
        first_row += count
    return order // ids.shape[1], row, tiles


def moe(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
    """`y[t] = sum_j weights[t, j] * W2_e (silu(W1_e x_t) * (W3_e x_t))` with e = ids[t, j].

    In fp32; returns [T, d] in the dtype of x. Skipped pairs add nothing.
    """
    local = local_ids(ids, expert_map)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    n = w2.shape[2]
    for e in local[local >= 0].unique().tolist():
        token, slot = (local == e).nonzero(as_tuple=True)
        z = x[token].float() @ w13[e].float().T
        y = (torch.nn.functional.silu(z[:, :n]) * z[:, n:]) @ w2[e].float().T
        out.index_add_(0, token, y * weights[token, slot].float()[:, None])
    return out.to(x.dtype)
