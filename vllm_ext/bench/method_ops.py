"""The whole attention op of methods with stages of their own, for `bench kernels`: one entry a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_ext.bench.kernels import Batch, Layer

METHODS: dict[str, dict[str, Any]] = {"vattention": {}, "tactic": {}, "resa": {}}
"""Method -> options beside the list's budget, page size and no dense layers. Budgets are limits for tactic."""
PROMPT = 128
"""Queries of the prompt chunk from which a request's state is made."""


def entry(name: str, options: dict[str, Any]) -> Callable[[Batch], tuple[float, Callable[[Layer], Any]]]:
    """An entry of `bench.kernels.KERNELS`; its floor is the bytes that the counters of one step report."""

    def make(b: Batch) -> tuple[float, Callable[[Layer], Any]]:
        return _operation(b, name, options)

    return make


def _operation(b: Batch, name: str, options: dict[str, Any]) -> tuple[float, Callable[[Layer], Any]]:
    import torch

    from vllm_ext import catalogue
    from vllm_ext.attention_backends.stages import DecodeBatch, StageDims
    from vllm_ext.bench.kernels import SCALE
    from vllm_ext.kernels.reference import index_record

    first = b.layers[0]
    hq, size, heads, page = first.q.shape[1], first.q.shape[2], first.k.shape[1], first.k.shape[2]
    shared = {"budget": b.capacity * page, "page_size": page, "dense_below": 0, "dense_layers": []}
    method = catalogue.get(name).cls()(**shared | options)
    dims = StageDims(
        hq, heads, size, b.case.batch, b.case.context, 1, first.q.device, first.q.dtype, tuple(range(len(b.layers)))
    )
    stages = method.stages(dims)
    stages.allocate()
    number = {id(x): i for i, x in enumerate(b.layers)}
    means = method.index == "mean"
    index = {
        id(x): torch.cat([index_record(k, "mean") for k in x.k.split(4096)]) if means else x.index for x in b.layers
    }

    def call(x: Layer) -> None:
        batch = DecodeBatch(x.table, b.seq_lens, b.start, b.slots, b.zeros, b.case.batch, 1)
        stages.decode(number[id(x)], x.q, x.k, x.v, index[id(x)], batch, x.out, SCALE)

    at = torch.arange(b.length - 1 - PROMPT, b.length - 1, device=first.q.device)
    ends = torch.arange(b.case.batch + 1, dtype=torch.int32, device=first.q.device) * PROMPT
    for x in b.layers:
        slots = torch.stack([row[at // page].long() * page + at % page for row in x.table]).flatten()
        q = x.q.repeat_interleave(PROMPT, 0)
        q = (0.5 * q + torch.randn_like(q)).to(q.dtype)  # the prompt's queries share a mean with the step's
        prompt = DecodeBatch(x.table, b.seq_lens - 1, ends, slots, torch.ones_like(b.zeros), q.shape[0], PROMPT)
        stages.write_index(number[id(x)], q, x.k, x.v, None, prompt, SCALE)
    for x in b.layers:
        call(x)
    keys, _, scored, _, _, _, chosen, _ = stages.stats.tolist()
    total = keys * 2 * size * first.k.element_size() + scored * stages.page_bytes + chosen
    return total / len(b.layers), call
