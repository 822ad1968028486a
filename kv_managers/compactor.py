"""Worker side: follows the requests of one KV-cache group and evicts at the start of a step.

An eviction is due in the first step that begins behind its boundary. It runs before the step's attention, outside the
captured graph, and touches private slots only: it reads the resident slots of the request, scores them, and moves the
survivors to the slots just below the boundary (`counts.py`). The scheduler frees what lies before one step later.
Requests that are due in the same step with equally many tokens are evicted together, if the method allows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_ext.kernels import kv_reference as reference
from vllm_ext.kv_managers.counts import Counts
from vllm_ext.kv_managers.rows import Row
from vllm_ext.kv_managers.view import KVView

WORKSPACE_BYTES = 256 << 20
"""Keys and values, or scores, that are held at once; more layers are scored in several calls."""
SCORE_BYTES = 48
"""Of a token and KV head while a method scores that gathers nothing."""
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
class Due:
    """A request that is due: `n` tokens are resident from slot `request.start` on; `kept` of the first `chosen` stay.

    Attributes:
        blocks: its block table.
        end: its tokens so far.
    """

    request: Request
    blocks: Tensor
    end: int
    prompt: int
    n: int
    chosen: int
    kept: int


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
        self.batched = self.method.batched and fused is not None

    def begin(self, row: Row, blocks: Callable[[], Tensor]) -> int:
        """`begin_step` of one row."""
        return self.begin_step([row], lambda _: blocks())[0]

    def begin_step(self, rows: Sequence[Row | None], blocks: Callable[[int], Tensor]) -> list[int]:
        """Evict for the rows that are due; returns the first resident slot of each.

        Args:
            rows: those of the step; None = padding.
            blocks: gives the block table [blocks] of a row on the device.
        """
        found, due = list[Request | None](), dict[tuple[int, ...], list[Due]]()
        for r, row in enumerate(rows):
            if row is None:
                found.append(None)
                continue
            request = self.requests.get(row.request)
            if request is None or row.before < request.computed:
                request = self._restart(row, request)
            request.computed = row.before
            if row.before >= request.due:
                one = self._due(request, row, blocks(r))
                alike = (one.n, one.chosen, one.kept) if self.batched else (r,)
                due.setdefault(alike, []).append(one)
            found.append(request)
        for batch in due.values():
            began = time.perf_counter()
            most = max(1, WORKSPACE_BYTES // (self._layer_bytes(batch[0].n) * len(self.layers)))
            for i in range(0, len(batch), most):
                self._evict(batch[i : i + most])
            self.totals.seconds += time.perf_counter() - began
        return [0 if request is None else request.start for request in found]

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

    def _due(self, request: Request, row: Row, blocks: Tensor) -> Due:
        end = row.prompt if self.one_shot else row.before  # tokens generated before a preemption judge no prompt
        chosen = self.counts.boundary(end, row.prompt) - request.start
        return Due(request, blocks, end, row.prompt, end - request.start, chosen, self.counts.kept(row.prompt))

    def _evict(self, batch: list[Due]) -> None:
        """Evict requests with the same `n`, `chosen` and `kept`."""
        n, chosen, kept = batch[0].n, batch[0].chosen, batch[0].kept
        size = self.method.block_size
        firsts = [one.request.start // size for one in batch]
        rows = torch.stack([one.blocks[f : f + -(-n // size)] for f, one in zip(firsts, batch)])
        positions = self._positions(batch)
        survivors = self._choose(batch, rows, positions)
        self._move(rows, survivors, chosen - kept)
        if positions is not None:
            positions = positions.gather(-1, survivors)
        for i, one in enumerate(batch):
            request = one.request
            request.positions = None if positions is None else positions[i]
            request.start += chosen - kept
            request.due = NEVER if self.one_shot else request.start + kept + self.method.stride
            if request.ring >= 0:
                self.free_rings.append(request.ring)
                request.ring = -1
            self.totals.compactions += 1
            self.totals.tokens_kept += kept
            self.totals.tokens_dropped += chosen - kept
            self.totals.blocks_freed += (chosen - kept) // size

    def _move(self, rows: Tensor, survivors: Tensor, target: int) -> None:
        if self.fused is not None:
            self.fused.compact(rows, survivors, target)
            return
        for row, kept in zip(rows, survivors):
            for i, layer in enumerate(self.layers):
                for cache in (layer.keys, layer.values, layer.side):
                    if cache is not None:
                        reference.compact(cache, row, kept[i], 0, target)

    def _positions(self, batch: list[Due]) -> Tensor | None:
        """[R, Ly, H, n] int64 positions of the resident tokens, if the method wants them."""
        if not self.method.needs_positions:
            return None
        keys, found = self.layers[0].keys, []
        for one in batch:
            old = one.request.positions
            known = 0 if old is None else old.shape[-1]
            since = torch.arange(one.end - one.n + known, one.end, device=keys.device)
            since = since.expand(len(self.layers), keys.shape[1], -1)
            found.append(since if old is None else torch.cat([old, since], -1))
        return torch.stack(found)

    def _choose(self, batch: list[Due], rows: Tensor, positions: Tensor | None) -> Tensor:
        """Indices of the survivors among the resident tokens: [R, Ly, H, kept] int64, ascending."""
        n, chosen, kept = batch[0].n, batch[0].chosen, batch[0].kept
        places = self._places(batch) if self.method.needs_queries else None
        scores = []
        for part in self._parts(n):
            view = self._view(batch, rows, part, places, positions)
            found = self.method.score(view).float()[..., :chosen]
            torch._assert_async(torch.isfinite(found).all(), f"{self.method.plugin_name()}: a score is not finite")
            found = found.unflatten(0, (len(batch), len(part)))
            scores.append(found.mean(2, keepdim=True) if self.method.scope != "head" else found)
        every = torch.cat(scores, 1) if len(scores) > 1 else scores[0]
        if self.method.scope == "model":
            every = every.mean(1, keepdim=True)
        recent = n - self.method.window
        pick = reference.choose if self.fused is None else self.fused.choose
        survivors = pick(every, kept, chosen, self.method.sinks, recent)
        return survivors.expand(len(batch), len(self.layers), self.layers[0].keys.shape[1], kept)

    def _layer_bytes(self, n: int) -> int:
        """What scoring one request in one layer holds."""
        keys = self.layers[0].keys
        token = SCORE_BYTES if self.batched else 2 * keys.shape[3] * keys.element_size()
        return n * keys.shape[1] * token

    def _parts(self, n: int) -> list[range]:
        """The layers in portions that fit the workspace."""
        step = max(1, WORKSPACE_BYTES // self._layer_bytes(n))
        return [range(i, min(i + step, len(self.layers))) for i in range(0, len(self.layers), step)]

    def _places(self, batch: list[Due]) -> Tensor:
        """[R, w] int32: rows of the flattened ring that hold the last queries, oldest first."""
        size, w = self.method.window, min(self.method.window, batch[0].n)
        found = [[one.request.ring * size + j % size for j in range(one.end - w, one.end)] for one in batch]
        device = batch[0].blocks.device
        host = torch.tensor(found, dtype=torch.int32, pin_memory=device.type == "cuda")
        return host.to(device, non_blocking=True)

    def _queries(self, part: range, places: Tensor) -> Tensor:
        """[R * L, w, Hq, D]."""
        if self.fused is not None:
            return self.fused.queries(places, part)
        rings = [self.layers[i].ring for i in part]
        return torch.stack([ring.flatten(0, 1)[at] for at in places for ring in rings if ring is not None])

    def _view(
        self, batch: list[Due], rows: Tensor, part: range, places: Tensor | None, positions: Tensor | None
    ) -> KVView:
        one, some = batch[0], [self.layers[i] for i in part]

        def resident(caches: Sequence[Tensor | None]) -> Tensor:
            return torch.stack([reference.resident(c, row, 0, one.n) for row in rows for c in caches if c is not None])

        def gather() -> tuple[Tensor, Tensor]:
            if self.fused is not None:
                return self.fused.gather(rows, one.n, part)
            return resident([x.keys for x in some]), resident([x.values for x in some])

        return KVView(
            layers=tuple(x.number for x in some) * len(batch), n=one.n, chosen=one.chosen, seen=one.end,
            prompt=one.prompt, budget=one.kept, scale=self.scale, heads=some[0].keys.shape[1], device=rows.device,
            gather=gather, query_window=None if places is None else self._queries(part, places),
            held_positions=None if positions is None else positions[:, part.start : part.stop].flatten(0, 1),
            held_side=resident([x.side for x in some]) if self.method.side_values else None,
            weights=(lambda i: some[i].weight()) if self.method.needs_output_weight else None,  # type: ignore[misc]
            grams=self.grams, state=one.request.state,
            fused=None if self.fused is None else self.fused.over(rows, part),
        )  # fmt: skip
