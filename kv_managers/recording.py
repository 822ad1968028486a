"""What an attention layer keeps of each step for eviction, on both platforms."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl

from vllm_ext.kv_managers.support import activate, new_ring, store_side


class RecordingImpl(AttentionImpl):
    """Keeps the queries that will score and the values beside the cache; stands before a stock implementation.

    Attributes:
        ring: [slots, window, Hq, D] query windows; None if the method scores without queries.
        side: [num_blocks, H, P, S] fp32 values beside the KV cache; None if the method stores none.
        side_input: [tokens, H, S] fp32, those of the step's tokens.
    """

    ring: torch.Tensor | None = None
    side: torch.Tensor | None = None
    side_input: torch.Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        activate(get_current_vllm_config())

    @abstractmethod
    def record(self, query: torch.Tensor, meta: Any, ring: torch.Tensor) -> None:
        """Write those of the step's queries [tokens, Hq, D] that will score to the ring."""

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        self.ring = new_ring(self, act_dtype)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Same contract as the stock implementation."""
        if attn_metadata is not None and self.ring is not None:
            self.record(query, attn_metadata, self.ring)
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write the new keys and values, and what the method stores beside them."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.side is not None and self.side_input is not None:
            store_side(self.side, self.side_input, slot_mapping)
