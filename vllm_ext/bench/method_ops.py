"""The whole attention op of methods with stages of their own, for `bench kernels`: one entry a method."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_ext.attention_backends.rope import ModelShape
    from vllm_ext.bench.kernels import Batch, Layer

METHODS: dict[str, dict[str, Any]] = {
    "vattention": {}, "tactic": {}, "resa": {}, "seer": {}, "infllm_v2": {"sink": 1, "local": 33}, "lychee": {},
}  # fmt: skip
"""Method -> options beside the list's budget, page size and no dense layers. Budgets are limits for tactic.

seer has random gates as wide as a head; lychee one retrieval head in three of four layers, as many as the paper's 24 in
the 31 layers of Llama-3.1-8B behind the first. retro's launches for steps of one token are quest's.
"""
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
    from vllm_ext.attention_backends.rope import ModelShape
    from vllm_ext.attention_backends.stages import DecodeBatch, StageDims
    from vllm_ext.bench.kernels import SCALE
    from vllm_ext.kernels.reference import index_record

    first = b.layers[0]
    hq, size, heads, page = first.q.shape[1], first.q.shape[2], first.k.shape[1], first.k.shape[2]
    # layer 0 is not timed: lychee's first layer reads every key
    number = {id(x): 1 + i for i, x in enumerate(b.layers)}
    layers = (0, *number.values())
    shared = {"budget": b.capacity * page, "page_size": page, "dense_below": 0, "dense_layers": []}
    dims = StageDims(hq, heads, size, b.case.batch, b.case.context, 1, first.q.device, first.q.dtype, layers)
    rope = {"kind": "default", "theta": 500_000.0, "share": 1.0}
    with tempfile.TemporaryDirectory() as folder:
        files = _files(name, ModelShape(len(layers), hq, heads, size, rope), page, Path(folder))
        method = catalogue.get(name).cls()(**shared | options | files)
        stages = method.stages(dims)
        record, page_bytes = method.record_elements(size), stages.page_bytes
    stages.allocate()
    # records that no shared kernel writes come from a prefill of every key
    own = method.index == "none" and record > 0
    index = {}
    for x in b.layers:
        if own:
            index[id(x)] = x.k.new_zeros(len(x.k), heads, record // size, size)
        elif method.index == "mean":
            index[id(x)] = torch.cat([index_record(k, "mean") for k in x.k.split(4096)])
        else:
            index[id(x)] = x.index

    def call(x: Layer, layer: int | None = None) -> None:
        batch = DecodeBatch(x.table, b.seq_lens, b.start, b.slots, b.zeros, b.case.batch, 1)
        at = number[id(x)] if layer is None else layer
        stages.decode(at, x.q, x.k, x.v, index[id(x)], batch, x.out, SCALE)

    tokens = b.length - 1 if own else min(PROMPT, b.length - 1)
    at = torch.arange(b.length - 1 - tokens, b.length - 1, device=first.q.device)
    ends = torch.arange(b.case.batch + 1, dtype=torch.int32, device=first.q.device) * tokens
    for layer, x in zip(layers, (first, *b.layers), strict=True):
        slots = torch.stack([row[at // page].long() * page + at % page for row in x.table]).flatten()
        q = x.q
        if not own:  # the prompt's queries share a mean with the step's
            q = x.q.repeat_interleave(tokens, 0)
            q = (0.5 * q + torch.randn_like(q)).to(q.dtype)
        prompt = DecodeBatch(x.table, b.seq_lens - 1, ends, slots, torch.ones_like(b.zeros), len(slots), tokens)
        stages.write_index(layer, q, x.k, x.v, index[id(x)] if own else None, prompt, SCALE)
    call(first, 0)
    stages.stats.zero_()
    for x in b.layers:
        call(x)
    keys, _, scored, _, _, _, chosen, _ = stages.stats.tolist()
    total = keys * 2 * size * first.k.element_size() + scored * page_bytes + chosen
    return total / len(b.layers), call


def _files(name: str, model: ModelShape, page: int, folder: Path) -> dict[str, str]:
    """Options of a trained method: random gates, or roles."""
    import torch

    from vllm_ext.attention_backends import gate_file, role_file

    if name == "seer":
        sizes = gate_file.shapes(model, model.head_size)
        gates = []
        for _ in range(model.layers):
            layer = {part: torch.randn(sizes[part]) / sizes[part][-2] ** 0.5 for part in ("q", "k")}
            gates.append(layer | {part: torch.ones(sizes[part]) for part in ("q_norm", "k_norm")})
        gate_file.write(folder / "gates.safetensors", gates, model, page)
        return {"gates": str(folder / "gates.safetensors")}
    if name == "lychee":
        roles = [
            [i == 0 or (i % 4 != 0 and h == i % model.kv_heads) for h in range(model.kv_heads)]
            for i in range(model.layers)
        ]
        role_file.write(folder / "roles.json", roles, [[float(x) for x in row] for row in roles], model)
        return {"roles": str(folder / "roles.json")}
    return {}
