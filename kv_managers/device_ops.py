"""The kernels behind an eviction on a GPU, with the signatures of the torch references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_ext.kernels.kv_compact import LayerCaches
from vllm_ext.kernels.kv_redundancy import redundancy
from vllm_ext.kernels.kv_select import choose
from vllm_ext.kernels.kv_window_score import WindowScore

if TYPE_CHECKING:
    from vllm_ext.kv_managers.compactor import Layer
    from vllm_ext.kv_managers.view import KVView

LONG = 4096
"""From so many resident tokens on, window attention is reduced by our kernel; below, one matrix product does it."""


class DeviceOps:
    """Launches over all layers of a group; `caches` are made when the KV cache is bound."""

    choose = staticmethod(choose)
    redundancy = staticmethod(redundancy)

    def __init__(self) -> None:
        self.caches: LayerCaches | None = None
        self.sides: LayerCaches | None = None

    def bind(self, layers: Sequence[Layer]) -> None:
        """Take the caches of the layers, K and V of a token side by side."""
        self.caches = LayerCaches([x.cache for x in layers])
        if layers[0].side is not None:
            self.sides = LayerCaches([x.side for x in layers if x.side is not None])

    def compact(self, blocks: Tensor, survivors: Tensor, first: int, target: int) -> None:
        """Move the survivors [L, H, k] of every layer."""
        assert self.caches is not None
        for caches in (self.caches, self.sides):
            if caches is not None:
                caches.compact(blocks, survivors, first, target)

    def gather(self, blocks: Tensor, first: int, end: int, part: range) -> tuple[Tensor, Tensor]:
        """Keys and values [L, H, n, D] of some layers."""
        assert self.caches is not None
        keys, values = self.caches.gather(blocks, first, end, part).chunk(2, dim=-1)
        return keys, values

    def over(self, layers: Sequence[Layer], blocks: Tensor, first: int) -> WindowOps:
        """Window attention of one request in some layers."""
        return WindowOps(layers, blocks, first)


class WindowOps:
    """`KVView`'s reductions of window attention."""

    redundancy = staticmethod(redundancy)

    def __init__(self, layers: Sequence[Layer], blocks: Tensor, first: int) -> None:
        self.layers, self.blocks, self.first = layers, blocks, first

    def applies(self, view: KVView) -> bool:
        """Whether the kernel is worth its launches."""
        return view.n >= LONG

    def heads(self, view: KVView, weights: Tensor | None) -> Tensor:
        """[L, Hq, n]."""
        return torch.stack([w.heads_sum(weights) for w in self._windows(view)])

    def worst(self, view: KVView, pool: int, columns: int | None) -> Tensor:
        """[L, H, columns]."""
        return torch.stack([w.worst(pool, columns) for w in self._windows(view)])

    def _windows(self, view: KVView) -> list[WindowScore]:
        return [
            WindowScore(q, layer.keys, self.blocks, self.first, view.n, view.scale)
            for q, layer in zip(view.queries, self.layers)
        ]
