"""The kernels behind an eviction on a GPU, with the signatures of the torch references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_ext.kernels.kv_compact import LayerCaches
from vllm_ext.kernels.kv_redundancy import redundancy
from vllm_ext.kernels.kv_select import choose
from vllm_ext.kernels.kv_tables import window_queries
from vllm_ext.kernels.kv_window_score import WindowScore

if TYPE_CHECKING:
    from vllm_ext.kv_managers.compactor import Layer
    from vllm_ext.kv_managers.view import KVView


class DeviceOps:
    """Launches over all layers of a group and several requests; `bind` makes it ready once the KV cache is bound.

    Block tables `rows` [R, blocks] begin with a request's first resident block; results go by request, then by layer.
    """

    choose = staticmethod(choose)

    def __init__(self) -> None:
        self.caches: LayerCaches | None = None
        self.keys: LayerCaches | None = None
        self.sides: LayerCaches | None = None
        self.ring: Tensor | None = None
        self.rings: Tensor | None = None

    def bind(self, layers: Sequence[Layer]) -> None:
        """Take the caches of the layers, K and V of a token side by side, and their query windows."""
        self.caches = LayerCaches([x.cache for x in layers])
        self.keys = LayerCaches([x.keys for x in layers])
        if layers[0].side is not None:
            self.sides = LayerCaches([x.side for x in layers if x.side is not None])
        rings = [x.ring for x in layers if x.ring is not None]
        if rings:
            self.ring = rings[0]
            self.rings = torch.tensor([x.data_ptr() for x in rings], dtype=torch.int64, device=self.ring.device)

    def compact(self, rows: Tensor, survivors: Tensor, target: int) -> None:
        """Move the survivors [R, L, H, k] of every layer to the slots from `target` on."""
        assert self.caches is not None
        for caches in (self.caches, self.sides):
            if caches is not None:
                caches.compact(rows, survivors, target)

    def gather(self, rows: Tensor, n: int, part: range) -> tuple[Tensor, Tensor]:
        """Keys and values [R * L, H, n, D] of some layers."""
        assert self.caches is not None
        keys, values = self.caches.gather(rows, 0, n, part).chunk(2, dim=-1)
        return keys, values

    def queries(self, places: Tensor, part: range) -> Tensor:
        """[R * L, w, Hq, D] of some layers; places [R, w] are rows of the flattened ring."""
        assert self.ring is not None
        assert self.rings is not None
        return window_queries(self.rings[part.start : part.stop], self.ring, places)

    def over(self, rows: Tensor, part: range) -> WindowOps:
        """What scores read of the requests in some layers."""
        assert self.keys is not None
        return WindowOps(self.keys, rows, part)


class WindowOps:
    """`KVView`'s reductions of window attention and of keys, straight from the cache."""

    def __init__(self, keys: LayerCaches, rows: Tensor, part: range) -> None:
        self.keys, self.rows, self.part = keys, rows, part
        self.window: WindowScore | None = None

    def heads(self, view: KVView, weights: Tensor | None) -> Tensor:
        """[L, Hq, n]."""
        return self._window(view).heads_sum(weights)

    def mean(self, view: KVView, weights: Tensor | None) -> Tensor:
        """[L, H, n]."""
        return self._window(view).mean(weights)

    def worst(self, view: KVView, pool: int, columns: int | None) -> Tensor:
        """[L, H, columns]."""
        return self._window(view).worst(pool, columns)

    def redundancy(self, view: KVView, threshold: float, recent: int) -> Tensor:
        """[L, H, n]."""
        return redundancy(self.keys, self.rows, view.n, threshold, recent, self.part)

    def _window(self, view: KVView) -> WindowScore:
        if self.window is None:
            self.window = WindowScore(view.queries, self.keys, self.rows, view.n, view.scale, self.part)
        return self.window
