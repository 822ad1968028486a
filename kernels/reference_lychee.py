"""Plain-PyTorch specification of LycheeDecode's step (arXiv 2602.04541, section 3.2, block form); the product on CPUs.

Shapes as in `reference`. Retrieval heads read every page and choose a list for the layers behind them; the other heads
read the list that the same KV head was handed, and hand it on.
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
    heads, page = k_cache.shape[1], k_cache.shape[2]
    chosen = select_pages(page_scores(q, k_cache, pages, n, scale), n, q.shape[0], page, capacity, sink, local)
    dense = sparse_attention(q, k_cache, v_cache, pages, None, n, scale)[0]
    if all(retrieval):
        return dense, chosen
    assert carried is not None
    role = torch.tensor(retrieval, device=q.device)
    sparse = sparse_attention(q, k_cache, v_cache, pages, carried, n, scale)[0]
    rows = role.repeat_interleave(q.shape[1] // heads)
    return torch.where(rows[None, :, None], dense, sparse), torch.where(role[:, None], chosen, carried)
