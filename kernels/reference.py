"""Plain-PyTorch specification of every kernel in this folder; also the product on CPUs.

Shapes used throughout: R requests of a decode batch, T query tokens (all requests), Hq query heads, H = Hkv KV
heads, g = Hq / H, D head size, P tokens a page, N pages of the longest request, C capacity of a page list.

* `q`            [T, Hq, D], rotary already applied.
* `k_cache`, `v_cache`  [num_pages, H, P, D], any strides (views of vLLM's paged cache).
* `index`        [num_pages, H, K, D], the record kept with each page (K = 2: minimum, maximum; K = 1: mean).
* `block_table`  [R, >= N] int32, physical page of each logical page.
* `seq_lens`     [R] int32, keys in the cache, this step's tokens included; 0 marks a padded request.
* `query_start_loc` [R + 1] int32, the m query tokens of request r are rows start[r] .. start[r+1]; the last one
  sits at position seq_lens[r] - 1.
* page lists: `ids` [R, H, C] int32 logical pages, ascending, tail -1; `counts` [R, H] int32; a count of -1 stands
  for "every page" (dense). One list serves all query tokens and query heads of a request and KV head.

All arithmetic is fp32; log-sum-exp (LSE) is natural; an empty partial has LSE = -inf and output 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EVERY_PAGE = -1
"""Value of `counts` that stands for a dense request."""


def page_count(n: int, page: int) -> int:
    """Pages that hold `n` keys."""
    return -(-n // page)


# ------------------------------------------------------------------------------------------- K1: page index
def index_record(keys: Tensor, kind: str) -> Tensor:
    """Record of full pages: `keys` [..., P, D] -> [..., K, D], in the dtype of the keys.

    `minmax` (Quest, section 3.2): channel-wise minimum and maximum. `mean`: arithmetic mean, fp32 then rounded.
    """
    if kind == "minmax":
        return torch.stack([keys.amin(-2), keys.amax(-2)], -2)
    if kind == "mean":
        return keys.float().mean(-2, keepdim=True).to(keys.dtype)
    raise ValueError(f"unknown page index '{kind}'; known: minmax, mean")


def update_index(k_cache: Tensor, index: Tensor, slot_mapping: Tensor, kind: str) -> None:
    """Recompute, in place, the record of every page that a token of this step completes.

    Args:
        slot_mapping: [T] int64, slot = page * P + offset of each new token, -1 for padding.

    A page is complete when its last slot is written. Incomplete pages need no record: the last page of a request
    is always read. The record is a pure function of the page's keys, so a page found in the prefix cache carries
    a valid one, and rewriting a slot (recompute after preemption, rejected drafts) recomputes it.
    """
    page = k_cache.shape[2]
    done = slot_mapping[(slot_mapping >= 0) & (slot_mapping % page == page - 1)] // page
    if done.numel():
        index[done] = index_record(k_cache[done], kind)


# ------------------------------------------------------------------------------------------- K2: page score
def grouped(q: Tensor, heads: int) -> Tensor:
    """Rows that share a KV head: [m, Hq, D] -> [H, m * g, D] fp32, row t * g + i is head h * g + i of token t."""
    m, hq, d = q.shape
    return q.float().view(m, heads, hq // heads, d).transpose(0, 1).reshape(heads, -1, d)


def combine_rows(scores: Tensor, group: str) -> Tensor:
    """One score per page from those of the rows: [H, rows, N] -> [H, N].

    `max`, `mean`: over the rows. `softmax`: sum over rows of the softmax over pages (InfLLM-V2, section 3.2).
    """
    if group == "max":
        return scores.amax(1)
    if group == "mean":
        return scores.mean(1)
    if group == "softmax":
        return scores.softmax(-1).sum(1)
    raise ValueError(f"unknown group reduction '{group}'; known: max, mean, softmax")


def page_scores(
    q: Tensor,
    k_cache: Tensor,
    index: Tensor | None,
    pages: Tensor,
    n: int,
    scale: float,
    score: str,
    group: str,
    radius: float = 1.0,
) -> Tensor:
    """Scores of the pages of one request: q [m, Hq, D], pages [N] physical -> [H, N] fp32.

    `bound` (Quest): `scale * sum_c max(q_c min_c, q_c max_c)` for `radius` 1; in general
    `scale * (q . centre + radius * |q| . half_range)`, centre = (max + min) / 2, half_range = (max - min) / 2.
    `dot`: `scale * q . mean`. `exact`: log-sum-exp of the page's causal logits. `recency`: the page's number, no key
    is read.
    """
    count, page = pages.numel(), k_cache.shape[2]
    heads = k_cache.shape[1]
    if score == "recency":
        return torch.arange(count, dtype=torch.float32, device=q.device).expand(heads, count)
    rows = grouped(q, heads)
    if score == "exact":
        keys = k_cache[pages].transpose(0, 1).float()  # [H, N, P, D]
        logits = torch.einsum("hrd,hnpd->hrnp", rows, keys) * scale
        limit = causal_limit(q.shape[0], q.shape[1] // heads, n, q.device)  # [rows]
        position = torch.arange(count * page, device=q.device).view(count, page)
        logits = logits.masked_fill(position[None] >= limit[:, None, None], -math.inf)
        return combine_rows(logits.logsumexp(-1), group)
    if index is None:
        raise ValueError(f"page score '{score}' needs a page index")
    record = index[pages].transpose(0, 1).float()  # [H, N, K, D]
    if score == "bound":
        low, high = record[:, :, 0], record[:, :, 1]
        s = torch.einsum("hrd,hnd->hrn", rows, (high + low) / 2)
        s += radius * torch.einsum("hrd,hnd->hrn", rows.abs(), (high - low) / 2)
    elif score == "dot":
        s = torch.einsum("hrd,hnd->hrn", rows, record[:, :, 0])
    else:
        raise ValueError(f"unknown page score '{score}'; known: bound, dot, exact, recency")
    s[:, :, (n - q.shape[0]) // page :] = -math.inf  # no record before this step; such pages are read anyway
    return combine_rows(s * scale, group)


def causal_limit(m: int, g: int, n: int, device: torch.device) -> Tensor:
    """Number of keys that each of the m * g rows may see: [m * g] int64."""
    return (n - m + 1 + torch.arange(m, device=device)).repeat_interleave(g)


# ------------------------------------------------------------------------------------------- K3: select
def forced_pages(n: int, m: int, page: int, sink: int, local: int) -> tuple[int, int]:
    """(first, last): pages below `first` and from `last` on are always read (sinks; local pages and every query's)."""
    count = page_count(n, page)
    return min(sink, count), max(0, min(count - local, (n - m) // page))


def select_pages(scores: Tensor, n: int, m: int, page: int, capacity: int, sink: int, local: int) -> Tensor:
    """The `min(capacity, N)` best pages of one request: scores [H, N] -> ids [H, <= capacity] ascending, int32.

    Forced pages come first, then the largest scores; equal scores go to the lower page.
    """
    first, last = forced_pages(n, m, page, sink, local)
    scores = scores.clone()
    scores[:, :first] = math.inf
    scores[:, last:] = math.inf
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :capacity]
    return order.sort(-1).values.to(torch.int32)


# ------------------------------------------------------------------------------------------- K4: attend
def sparse_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages: Tensor,
    ids: Tensor | None,
    n: int,
    scale: float,
    log_weight: Tensor | None = None,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one request's m query tokens over listed pages.

    Args:
        q: [m, Hq, D]; pages: [N] physical pages; n: keys in the cache.
        ids: [H, c] logical pages, -1 = no entry, or None for every page.
        log_weight: [H, c] fp32 added to every logit of an entry (importance weights), or None.
        row_mask: [H, c] int32, bit t set = query token t may read the entry, or None.

    Returns:
        output [m, Hq, D] in the dtype of q, LSE [m, Hq] fp32 (-inf where nothing was read).
    """
    heads, page = k_cache.shape[1], k_cache.shape[2]
    m, hq, _ = q.shape
    g = hq // heads
    if ids is None:
        ids = torch.arange(pages.numel(), device=q.device).expand(heads, -1)
    unused, ids = ids < 0, ids.long().clamp(min=0)
    head = torch.arange(heads, device=q.device)[:, None]
    keys = k_cache[pages[ids], head].float().flatten(1, 2)  # [H, c * P, D]
    values = v_cache[pages[ids], head].float().flatten(1, 2)
    logits = torch.bmm(grouped(q, heads), keys.transpose(1, 2)) * scale
    position = (ids[:, :, None] * page + torch.arange(page, device=q.device)).flatten(1)
    hidden = position[:, None, :] >= causal_limit(m, g, n, q.device)[None, :, None]
    hidden = hidden | unused.repeat_interleave(page, 1)[:, None, :]
    if row_mask is not None:
        token = torch.arange(m, device=q.device).repeat_interleave(g)
        bit = (row_mask[:, None, :].long() >> token[None, :, None]) & 1
        hidden = hidden | (bit == 0).repeat_interleave(page, 2)
    if log_weight is not None:
        logits = logits + log_weight.repeat_interleave(page, 1)[:, None, :]
    logits = logits.masked_fill(hidden, -math.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.clamp(min=-1e30)[..., None]).exp()
    out = torch.bmm(weights, values)

    def per_token(x: Tensor) -> Tensor:
        return x.view(heads, m, g, -1).transpose(0, 1).reshape(m, hq, -1)

    return per_token(out).to(q.dtype), per_token(lse).squeeze(-1)


# ------------------------------------------------------------------------------------------- K5: merge
def merge(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge S partial results over disjoint key sets: [S, ..., D], [S, ...] -> [..., D] fp32, [...] fp32.

    `L = log sum_s exp(L_s)`, `O = sum_s exp(L_s - L) O_s`; empty partials (LSE = -inf) weigh nothing.
    """
    top = lses.amax(0).clamp(min=-1e30)
    weight = (lses - top).exp()  # relative to the largest: exact also where |LSE| is large
    total = weight.sum(0)
    out = (weight[..., None] * outputs.float()).sum(0) / total.clamp(min=1e-30)[..., None]
    return out, top + total.log()
