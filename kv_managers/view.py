"""What a method's `score` sees: the resident tokens of one request in some layers, and the queries that judge them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vllm_ext.kernels import kv_reference as reference


@dataclass
class KVView:
    """One request, L layers; of a method that is `batched`, several requests like the first, one after the other on L.

    Attributes:
        layers: numbers of the layers on axis L.
        n: resident tokens, in order of position; the newest is n - 1.
        chosen: leading tokens that may be evicted; scores of the others are ignored.
        seen: tokens of the request so far, evicted ones included; the next token gets this position.
        prompt: tokens of the prompt.
        budget: survivors of the `chosen` tokens.
        scale: of the logits.
        query_window: [L, w, Hq, D] queries at positions seen - w .. seen - 1; None unless the method needs them.
        state: lives as long as the request on this worker.
    """

    layers: tuple[int, ...]
    n: int
    chosen: int
    seen: int
    prompt: int
    budget: int
    scale: float
    heads: int
    device: torch.device
    gather: Callable[[], tuple[Tensor, Tensor]]
    query_window: Tensor | None = None
    held_positions: Tensor | None = None
    held_side: Tensor | None = None
    weights: Callable[[int], Tensor] | None = None
    grams: dict[int, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    fused: Any = None

    @classmethod
    def from_tensors(
        cls, keys: Tensor, values: Tensor, queries: Tensor | None = None, *, scale: float, budget: int,
        prompt: int | None = None, chosen: int | None = None, seen: int | None = None, positions: Tensor | None = None,
        side: Tensor | None = None, output_weights: Sequence[Tensor] | None = None,
        layers: Sequence[int] | None = None,
    ) -> KVView:  # fmt: skip
        """A view over plain tensors: keys, values [L, H, n, D], queries [L, w, Hq, D], output_weights L x [Hq, D,
        hidden].
        """
        count, heads, n, _ = keys.shape
        return cls(
            layers=tuple(layers or range(count)), n=n, chosen=n if chosen is None else chosen,
            seen=n if seen is None else seen, prompt=n if prompt is None else prompt, budget=budget, scale=scale,
            heads=heads, device=keys.device, gather=lambda: (keys, values), query_window=queries,
            held_positions=positions, held_side=side, weights=None if output_weights is None else lambda i:
            output_weights[i],
        )  # fmt: skip

    @cached_property
    def _gathered(self) -> tuple[Tensor, Tensor]:
        return self.gather()

    @property
    def keys(self) -> Tensor:
        """[L, H, n, D] keys after RoPE, in the cache's dtype."""
        return self._gathered[0]

    @property
    def values(self) -> Tensor:
        """[L, H, n, D] values, in the cache's dtype."""
        return self._gathered[1]

    @property
    def queries(self) -> Tensor:
        """[L, w, Hq, D] queries after RoPE of the last w tokens."""
        if self.query_window is None:
            raise RuntimeError("this method declares needs_queries = False and reads view.queries.")
        return self.query_window

    @cached_property
    def positions(self) -> Tensor:
        """[L, H, n] int64 positions in the request."""
        if self.held_positions is not None:
            return self.held_positions
        if self.seen != self.n:
            raise RuntimeError("this method declares needs_positions = False and reads view.positions.")
        return torch.arange(self.n, device=self.keys.device).expand(len(self.layers), self.heads, self.n)

    @property
    def side(self) -> Tensor:
        """[L, H, n, side_values] fp32 values that the method stored with each token."""
        if self.held_side is None:
            raise RuntimeError("this method declares side_values = 0 and reads view.side.")
        return self.held_side

    def output_weight(self, i: int) -> Tensor:
        """[Hq, D, hidden] slices of the output projection of layer `layers[i]`."""
        if self.weights is None:
            raise RuntimeError("this method declares needs_output_weight = False and reads view.output_weight.")
        return self.weights(i)

    def output_gram(self, i: int) -> Tensor:
        """[Hq, D, D] fp32 `W_O W_O^T` per query head of layer `layers[i]`: ||v W_O||_2^2 = v gram v."""
        layer = self.layers[i]
        if layer not in self.grams:
            w = self.output_weight(i).float()
            self.grams[layer] = w @ w.transpose(-1, -2)
        return self.grams[layer]

    def attention(self) -> Tensor:
        """[L, Hq, w, n] fp32 causal attention of the window to every resident token."""
        return reference.window_attention(self.queries, self.keys, self.scale)

    def attention_heads(self, weights: Tensor | None = None) -> Tensor:
        """[L, Hq, n] fp32: attention summed over the window with `weights` [w], default 1 / w."""
        if self.fused is not None:
            return self.fused.heads(self, weights)
        return reference.weighted_rows(self.attention(), weights)

    def attention_mean(self, weights: Tensor | None = None) -> Tensor:
        """[L, H, n] fp32: `attention_heads` averaged over the GQA group."""
        if self.fused is not None:
            return self.fused.mean(self, weights)
        return reference.group_mean(self.attention_heads(weights), self.heads)

    def attention_max(self, pool: int = 1, columns: int | None = None) -> Tensor:
        """[L, H, columns] fp32: largest attention over window and group, rows average-pooled and rescaled first."""
        if self.fused is not None:
            return self.fused.worst(self, pool, columns)
        return reference.worst_case(self.attention(), self.heads, pool, columns)

    def redundancy(self, threshold: float, recent: int) -> Tensor:
        """[L, H, n] fp32: `kv_reference.redundancy` of the keys."""
        if self.fused is not None:
            return self.fused.redundancy(self, threshold, recent)
        return reference.redundancy(self.keys, threshold, recent)
