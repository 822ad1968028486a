"""How ThinKV's schedule meets the engine: segments of a view, their new sizes, and the tokens that stay in each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from vllm_ext.kernels import kv_reference as reference
from vllm_ext.kernels import kv_score_think as formula

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_ext.kv_managers.view import KVView


def sparsity(view: KVView, wanted: Sequence[int]) -> list[Tensor]:
    """Sparsity of the window's attention in the layers `view.layers[i]`, i in `wanted`; device scalars."""
    queries = view.queries[list(wanted)]
    w = queries.shape[1]
    attention = reference.window_attention(queries, view.keys[list(wanted)], view.scale)
    visible = torch.arange(view.n - w + 1, view.n + 1, device=attention.device)
    return list(formula.sparsity(attention, visible))


def scores(view: KVView, types: Mapping[int, int], stride: int, schedule: Sequence[int], sinks: int) -> Tensor:
    """1 for exactly `view.budget` of the `view.chosen` tokens, 0 for the others: [L, H, n] fp32.

    Every layer and head holds equally many tokens of a segment, so the plan is one for all.
    """
    found = torch.unique_consecutive(view.positions[0, 0, : view.chosen] // stride, return_counts=True)
    segments, held = (x.tolist() for x in found)
    recent = view.n - view.queries.shape[1]
    ends = list(itertools.accumulate(held))
    least = [
        max(0, min(end, sinks) - (end - size)) + max(0, end - max(end - size, recent, sinks))
        for end, size in zip(ends, held)
    ]
    known = [types.get(s, formula.REASONING) for s in segments]
    # The newest segment has no type yet and keeps all while it can.
    older = formula.shrink(held[:-1], known[:-1], view.budget - held[-1], schedule)
    kept = formula.fit([*older, held[-1]], held, view.budget, least)
    forced = torch.arange(view.chosen, device=view.device)
    forced = (forced < sinks) | (forced >= recent)
    return _chosen(view, held, kept, forced)


def _chosen(view: KVView, held: Sequence[int], kept: Sequence[int], forced: Tensor) -> Tensor:
    out = torch.zeros(len(view.layers), view.heads, view.n, device=view.device)
    starts = [end - size for end, size in zip(itertools.accumulate(held), held)]
    for size, count in {(h, k) for h, k in zip(held, kept) if k}:
        first = [s for s, h, k in zip(starts, held, kept) if (h, k) == (size, count)]
        index = torch.tensor(first, device=view.device)[:, None] + torch.arange(size, device=view.device)
        keys = view.keys[:, :, index]  # [L, H, segments, size, D]
        must = forced[index].expand(keys.shape[:-1])
        worth = formula.medoid_rank(keys.flatten(0, 2), must.flatten(0, 2), count).view(must.shape)
        best = worth.topk(count, -1).indices
        mark = torch.zeros_like(worth).scatter_(-1, best, 1.0)
        out[:, :, index.flatten()] = mark.flatten(2)
    return out
