"""Sparse attention by definition, in fp64 and one page at a time, compared with every decode step of a CPU engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from engines import PAGE


class Checker:
    """Compares every sparse decode step of an engine with the method's definition, worked out from the cached keys."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from vllm_ext.attention_backends.cpu_backend import SparseCPUImpl

        self.steps = self.several = self.partial = 0
        self.worst = 0.0
        original = SparseCPUImpl._sparse

        def checked(impl: Any, method: Any, query: Any, kv_cache: Any, meta: Any, output: Any) -> None:
            original(impl, method, query, kv_cache, meta, output)
            for r in meta.sparse_rows:
                self.compare(impl, method, query, kv_cache, meta, output, r)

        patch.setattr(SparseCPUImpl, "_sparse", checked)

    def compare(self, impl: Any, method: Any, query: Any, kv_cache: Any, meta: Any, output: Any, r: int) -> None:
        """One request of one layer."""
        from vllm_ext.attention_backends.cpu_backend import cache_views

        rows, n = slice(meta.starts[r], meta.starts[r + 1]), meta.lens[r]
        pages = meta.block_table[r, : -(-n // PAGE)].long()
        keys, values = (x[pages].transpose(1, 2).flatten(0, 1)[:n] for x in cache_views(kv_cache))
        q = query.view(-1, impl.num_heads, impl.head_size)[rows]
        want, read = attention(method, q.double(), keys.double(), values.double(), impl.scale)
        got = output.view(-1, impl.num_heads, impl.head_size)[rows]
        self.worst = max(self.worst, (got - want).abs().max().item())
        self.steps += 1
        self.several += q.shape[0] > 1
        self.partial += read < n


def attention(
    method: Any, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, int]:
    """Sparse attention of m tokens by definition: q [m, Hq, D], keys and values [n, H, D]; and keys read by a head."""
    (m, hq, _), (n, heads, _) = q.shape, keys.shape
    g = hq // heads
    hidden = torch.arange(n)[None] > torch.arange(n - m, n)[:, None]
    out, read = torch.zeros_like(q), 0
    for h in range(heads):
        mine = q[:, h * g : (h + 1) * g]
        logits = torch.einsum("tid,nd->tin", mine, keys[:, h]) * scale
        logits = logits.masked_fill(hidden[:, None], -math.inf)
        alone = method.plugin_name() == "retro"  # each token chooses for itself, all read what any chose
        chosen = sorted({
            p
            for rows, end in ([(slice(t, t + 1), n - m + 1 + t) for t in range(m)] if alone else [(slice(0, m), n)])
            for p in choose(
                method,
                [page_score(method, mine[rows], keys[:, h], logits[rows], p, scale) for p in range(-(-end // PAGE))],
                end,
                rows.stop - rows.start,
            )
        })  # fmt: skip
        seen = [i for p in chosen for i in range(p * PAGE, min(n, (p + 1) * PAGE))]
        out[:, h * g : (h + 1) * g] = logits[..., seen].softmax(-1) @ values[seen, h]
        read = max(read, len(seen))
    return out, read


def page_score(method: Any, q: torch.Tensor, keys: torch.Tensor, logits: torch.Tensor, p: int, scale: float) -> float:
    """Score of page p for the rows q [m, g, D] of one KV head."""
    page = keys[p * PAGE : (p + 1) * PAGE]
    if method.score == "bound":
        return (torch.maximum(q * page.amin(0), q * page.amax(0)).sum(-1) * scale).max().item()
    if method.score == "exact":
        return logits.softmax(-1)[..., p * PAGE : (p + 1) * PAGE].sum().item()
    return float(p)


def choose(method: Any, scores: list[float], n: int, m: int) -> list[int]:
    """The pages a list holds: sinks, local pages, pages of the queries, then the best."""
    count = len(scores)
    forced = {p for p in range(count) if p < method.sink or p >= count - method.local or p >= (n - m) // PAGE}
    ranked = sorted(range(count), key=lambda p: (p not in forced, -scores[p], p))
    return sorted(ranked[: method.capacity])
