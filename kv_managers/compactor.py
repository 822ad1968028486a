"""Worker side: follows the requests of one KV-cache group and evicts at the start of a step.

An eviction is due in the first step that begins behind its boundary. It runs before the step's attention, outside the
captured graph, and touches private slots only: it reads the resident slots of the request, scores them, and moves the
survivors to the slots just below the boundary (`counts.py`). The scheduler frees what lies before one step later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_ext.kernels import kv_reference as reference
from vllm_ext.kv_managers.counts import Counts
from vllm_ext.kv_managers.rows import Row
from vllm_ext.kv_managers.view import KVView

WORKSPACE_BYTES = 256 << 20
"""Keys and values that are gathered at once; more layers are scored in several calls."""
NEVER = 1 << 62


@dataclass
class Request:
    """What the worker knows of a request: resident slots begin at `start`, the next eviction is due at `due` tokens."""

    start: int
    due: int
    computed: int
    ring: int = -1
    positions: Tensor | None = None
    state: dict[str, Any] = field(default_factory=dict)


@dataclass
class Layer:
    """One attention layer: its cache, views [num_blocks, H, P, D] of it, its query windows [slots, w, Hq, D]."""

    number: int
    cache: Tensor
    keys: Tensor
    values: Tensor
    ring: Tensor | None
    side: Tensor | None
    weight: Callable[[], Tensor] | None


@dataclass
class Totals:
    """Counters of a group since the engine started; tokens are counted per request, seconds on the host."""

    compactions: int = 0
    tokens_kept: int = 0
    tokens_dropped: int = 0
    blocks_freed: int = 0
    seconds: float = 0.0


class Compactor:
    """Evicts for all layers of one KV-cache group."""

    def __init__(
        self, counts: Counts, *, ring_slots: int, scale: float, live: Callable[[], set[str]] = set, fused: Any = None
    ) -> None:
        self.counts, self.method, self.scale, self.fused = counts, counts.method, scale, fused
        self.live, self.layers = live, list[Layer]()
        self.requests: dict[str, Request] = {}
        self.free_rings = list(range(ring_slots))
        self.totals = Totals()
        self.grams: dict[int, Tensor] = {}
        self.one_shot = self.method.trigger == "prefill_end"

    def begin(self, row: Row, blocks: Callable[[], Tensor]) -> int:
        """Evict for one row if it is due; returns its first resident slot.

        Args:
            row: the request's row of the step.
            blocks: gives its block table [blocks] on the device.
        """
        request = self.requests.get(row.request)
        if request is None or row.before < request.computed:
            request = self._restart(row, request)
        request.computed = row.before
        if row.before >= request.due:
            began = time.perf_counter()
            self._evict(request, row, blocks())
            self.totals.seconds += time.perf_counter() - began
        return request.start

    def _restart(self, row: Row, old: Request | None) -> Request:
        """A request that is new, or computed again after a preemption."""
        if old is not None and old.ring >= 0:
            self.free_rings.append(old.ring)
        if self.counts.start(row.before, row.prompt):
            raise RuntimeError(f"vllm-ext: request {row.request} begins behind its first eviction.")
        first = self.counts.first_event(row.prompt)
        fresh = Request(0, NEVER if first is None else first, 0)
        self.requests[row.request] = fresh
        return fresh

    def forget(self, live: set[str]) -> None:
        """Drop the requests that are not in `live`."""
        for name in [n for n in self.requests if n not in live]:
            ring = self.requests.pop(name).ring
            if ring >= 0:
                self.free_rings.append(ring)

    def record_range(self, row: Row) -> tuple[int, int, int]:
        """Which tokens of a row to record: (ring slot, first position, end); an empty range if none.

        Those are the last `window` tokens before the next eviction; of a one-shot method, of the prompt.
        """
        request = self.requests[row.request]
        last = request.due if self.one_shot else max(row.after, request.due)
        first, end = max(row.before, last - self.method.window), min(row.after, last)
        if first >= end:
            return -1, 0, 0
        if request.ring < 0:
            if not self.free_rings:
                self.forget(self.live())
            if not self.free_rings:
                raise RuntimeError("vllm-ext: more requests await an eviction than planned; lower --max-num-seqs.")
            request.ring = self.free_rings.pop()
        return request.ring, first, end

    def _evict(self, request: Request, row: Row, blocks: Tensor) -> None:
        if self.one_shot:  # tokens that were generated before a preemption do not judge the prompt
            row = row._replace(before=row.prompt)
        boundary = self.counts.boundary(row.before, row.prompt)
        kept = self.counts.kept(row.prompt)
        n, chosen = row.before - request.start, boundary - request.start
        positions = self._positions(request, row, n)
        survivors = self._choose(request, row, blocks, n, chosen, kept, positions)
        self._move(blocks, survivors, request.start, boundary - kept)
        if positions is not None:
            request.positions = positions.gather(-1, survivors)
        self.totals.blocks_freed += (boundary - kept - request.start) // self.method.block_size
        request.start = boundary - kept
        request.due = NEVER if self.one_shot else boundary + self.method.stride
        if request.ring >= 0:
            self.free_rings.append(request.ring)
            request.ring = -1
        self.totals.compactions += 1
        self.totals.tokens_kept += kept
        self.totals.tokens_dropped += chosen - kept

    def _move(self, blocks: Tensor, survivors: Tensor, first: int, target: int) -> None:
        if self.fused is not None:
            self.fused.compact(blocks, survivors, first, target)
            return
        for i, layer in enumerate(self.layers):
            for cache in (layer.keys, layer.values, layer.side):
                if cache is not None:
                    reference.compact(cache, blocks, survivors[i], first, target)

    def _positions(self, request: Request, row: Row, n: int) -> Tensor | None:
        """[Ly, H, n] int64 positions of the resident tokens, if the method wants them."""
        if not self.method.needs_positions:
            return None
        keys = self.layers[0].keys
        shape = (len(self.layers), keys.shape[1])
        if request.positions is None:
            return torch.arange(request.start, row.before, device=keys.device).expand(*shape, n)
        old = request.positions
        since = torch.arange(row.before - n + old.shape[-1], row.before, device=keys.device).expand(*shape, -1)
        return torch.cat([old, since], -1)

    def _choose(
        self, request: Request, row: Row, blocks: Tensor, n: int, chosen: int, kept: int, positions: Tensor | None
    ) -> Tensor:
        """Indices of the survivors among the resident tokens: [Ly, H, kept] int64, ascending."""
        heads = self.layers[0].keys.shape[1]
        scores = []
        for part in self._parts(n):
            view = self._view(request, row, blocks, part, n, chosen, kept, positions)
            found = self.method.score(view).float()[..., :chosen]
            torch._assert_async(torch.isfinite(found).all(), f"{self.method.plugin_name()}: a score is not finite")
            scores.append(found.mean(1, keepdim=True) if self.method.scope != "head" else found)
        every = torch.cat(scores)
        if self.method.scope == "model":
            every = every.mean(0, keepdim=True)
        recent = n - self.method.window
        pick = reference.choose if self.fused is None else self.fused.choose
        return pick(every.contiguous(), kept, chosen, self.method.sinks, recent).expand(len(self.layers), heads, kept)

    def _parts(self, n: int) -> list[range]:
        """The layers in portions whose keys and values fit the workspace."""
        keys = self.layers[0].keys
        size = 2 * n * keys.shape[1] * keys.shape[3] * keys.element_size()
        step = max(1, WORKSPACE_BYTES // size)
        return [range(i, min(i + step, len(self.layers))) for i in range(0, len(self.layers), step)]

    def _view(
        self, request: Request, row: Row, blocks: Tensor, part: range, n: int, chosen: int, kept: int,
        positions: Tensor | None,
    ) -> KVView:  # fmt: skip
        some = [self.layers[i] for i in part]
        first, end = request.start, row.before

        def gather() -> tuple[Tensor, Tensor]:
            if self.fused is not None:
                return self.fused.gather(blocks, first, end, part)
            k = torch.stack([reference.resident(x.keys, blocks, first, end) for x in some])
            return k, torch.stack([reference.resident(x.values, blocks, first, end) for x in some])

        queries = None
        if self.method.needs_queries:
            w = min(self.method.window, end)
            order = torch.arange(end - w, end, device=blocks.device) % self.method.window
            queries = torch.stack([x.ring[request.ring] for x in some if x.ring is not None])[:, order]
        side = None
        if self.method.side_values:
            side = torch.stack([reference.resident(x.side, blocks, first, end) for x in some if x.side is not None])
        return KVView(
            layers=tuple(x.number for x in some), n=n, chosen=chosen, seen=end, prompt=row.prompt, budget=kept,
            scale=self.scale, heads=some[0].keys.shape[1], device=blocks.device, gather=gather, query_window=queries,
            held_positions=None if positions is None else positions[part.start : part.stop], held_side=side,
            weights=(lambda i: some[i].weight()) if self.method.needs_output_weight else None,  # type: ignore[misc]
            grams=self.grams, state=request.state,
            fused=None if self.fused is None else self.fused.over(some, blocks, first),
        )  # fmt: skip
