"""Plain-PyTorch specification of LycheeDecode's step (arXiv 2602.04541, section 3.2, block form); the product on CPUs.

Shapes as in `reference`. Retrieval heads read every page and choose a list for the layers behind them; the other heads
read the list that the same KV head was handed, and hand it on; or, without lists, first and last pages (DuoAttention,
arXiv 2410.10819, section 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_ext.kernels.reference import grouped, select_pages, sparse_attention


def page_scores(q: Tensor, k_cache: Tensor, pages: Tensor, n: int, scale: float) -> Tensor:
    """Largest logit in each page of the mean query of all rows of a KV head: q [m, Hq, D], pages [N] -> [H, N] fp32."""
    heads, page = k_cache.shape[1], k_cache.shape[2]
    mean = grouped(q, heads).mean(1)
    logits = torch.einsum("hd,nhpd->hnp", mean, k_cache[pages].float()) * scale
    position = torch.arange(pages.numel() * page, device=q.device).view(-1, page)
    return logits.masked_fill(position >= n, -math.inf).amax(-1)


def recent_pages(count: int, capacity: int, sink: int) -> Tensor:
    """The first `sink` of `count` pages and the last ones, `capacity` in all: [c] int32 ascending."""
    ids = torch.arange(min(count, capacity), dtype=torch.int32)
    return ids + (ids >= sink) * (count - ids.numel())


def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, n: int, scale: float, retrieval: list[bool],
    lists: Tensor | None,
) -> Tensor:  # fmt: skip
    """Output [m, Hq, D]: retrieval heads read every page, the others their `lists` [H, c]; arguments as of `step`."""
    dense = sparse_attention(q, k_cache, v_cache, pages, None, n, scale)[0]
    if all(retrieval):
        return dense
    assert lists is not None
    rows = torch.tensor(retrieval, device=q.device).repeat_interleave(q.shape[1] // len(retrieval))
    return torch.where(rows[None, :, None], dense, sparse_attention(q, k_cache, v_cache, pages, lists, n, scale)[0])


def step(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, n: int, scale: float, retrieval: list[bool],
    carried: Tensor | None, capacity: int, sink: int, local: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One layer for one request.

    Args:
        q: [m, Hq, D]; pages: [N] physical pages; retrieval: per KV head; carried: [H, c] ids from the layers before,
            None where every head is a retrieval head.

    Returns:
        output [m, Hq, D], ids [H, c] for the layers behind.
    """
    page = k_cache.shape[2]
    chosen = select_pages(page_scores(q, k_cache, pages, n, scale), n, q.shape[0], page, capacity, sink, local)
    out = attend(q, k_cache, v_cache, pages, n, scale, retrieval, carried)
    if all(retrieval):
        return out, chosen
    assert carried is not None
    return out, torch.where(torch.tensor(retrieval, device=q.device)[:, None], chosen, carried)
