"""InfLLM-V2's window scores in plain torch: the specification of `kernels.window_select` (arXiv 2509.24663, section 3).

With pages of P tokens (P = 64 in the paper) a fine window is P / 2 keys at every P / 4, a coarse window 2 P keys at
every P. A window belongs to the page of its last key, so the record of page b, [5, D], holds the means of the fine
windows that start at (b - 1/4) P, b P, (b + 1/4) P, (b + 1/2) P, and of the coarse window that starts at (b - 1) P.
The two windows that begin before page 0 do not exist; their vectors are zero and never scored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_ext.kernels.reference import grouped

RECORD = 5
"""Vectors of a page's record: four fine means and a coarse one."""


def window_record(keys: Tensor, before: Tensor | None) -> Tensor:
    """Record of one page: keys [H, P, D] and those of the page before it (None for page 0) -> [H, 5, D] fp32."""
    heads, page, d = keys.shape
    quarters = keys.float().view(heads, 4, page // 4, d).mean(2)
    out = torch.zeros(heads, RECORD, d, device=keys.device)
    out[:, 1:4] = (quarters[:, :3] + quarters[:, 1:]) / 2
    if before is not None:
        last = before.float().view(heads, 4, page // 4, d).mean(2)
        out[:, 0] = (last[:, 3] + quarters[:, 0]) / 2
        out[:, 4] = (last.mean(1) + quarters.mean(1)) / 2
    return out


def update_windows(k_cache: Tensor, index: Tensor, pages: Tensor, first: int, end: int) -> None:
    """Write the records of one request's pages first .. end - 1; pages [N] physical, index [num_pages, H, 5, D]."""
    for b in range(first, end):
        before = k_cache[pages[b - 1]] if b else None
        index[pages[b]] = window_record(k_cache[pages[b]], before).to(index.dtype)


def window_scores(q: Tensor, index: Tensor, pages: Tensor, n: int, page: int, scale: float) -> Tensor:
    """Scores of the pages of one request: q [m, Hq, D], index [num_pages, H, 5, D], pages [N] -> [H, N] fp32.

    Of every fine window, the softmax weights of the group's heads, normalised by the log-sum-exp over the coarse
    windows, are added up; a page scores the largest of the five fine windows that overlap it. Several query tokens
    share a list: the largest of their scores. A window counts if its page was complete before this step; pages behind
    those score -inf.
    """
    m, heads = q.shape[0], index.shape[1]
    complete = (n - m) // page
    out = torch.full((heads, pages.numel()), -math.inf, device=q.device)
    if not complete:
        return out
    record = index[pages[:complete]].transpose(0, 1).float()  # [H, complete, 5, D]
    rows = grouped(q, heads)  # [H, m * g, D]
    coarse = torch.einsum("hrd,hbd->hrb", rows, record[:, 1:, 4]) * scale
    lse = coarse.logsumexp(-1) if complete > 1 else torch.zeros(rows.shape[:2], device=q.device)
    fine = torch.einsum("hrd,hbwd->hrbw", rows, record[:, :, :4]) * scale
    weight = (fine - lse[:, :, None, None]).exp().unflatten(1, (m, -1)).sum(2).amax(1)  # [H, complete, 4]
    weight[:, 0, 0] = -math.inf
    following = torch.full_like(weight[:, :, 0], -math.inf)
    following[:, :-1] = weight[:, 1:, 0]
    out[:, :complete] = torch.maximum(weight.amax(-1), following)
    return out
