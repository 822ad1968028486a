"""Prompts for timing decode steps: synthetic keys of a stated peakedness instead of attention over the prompts.

Dummy weights attend to all keys alike, which no model does and which flatters or starves methods that adapt to the
attention. Here the logits of a decode step are normal with a chosen standard deviation: with 3, 4 % of the keys hold
90 % of the weight. Half of their variance is shared by the keys of a span of 64, so that pages differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

SPAN = 64
"""Adjacent keys that share a part."""
SHARED = 0.5
"""Share of the variance that they share."""
TABLE = 4096
"""Different shared parts; requests of more spans repeat them."""


@contextlib.contextmanager
def synthetic_prompts(logit_std: float, seed: int = 0) -> Iterator[None]:
    """Engines that are created and used in this block give prompts synthetic keys and do not attend to them.

    The keys of prompt tokens are random, scaled by the length of the layer's queries; values are the model's. Outputs
    mean nothing. Steps that only decode are untouched, so that their time is that of the engine as it is.

    Args:
        logit_std: standard deviation of `scale * q . k` over the keys of a request.
        seed: of the keys.

    Raises:
        ConfigError: the engine attended without FlashAttention, so that its prompts were its own.
    """
    import torch
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    from vllm_ext.options import ConfigError

    keys = _Keys(logit_std, seed)
    forward, update = FlashAttentionImpl.forward, FlashAttentionImpl.do_kv_cache_update

    def cheap_forward(
        self: Any, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, output: Any,
        *rest: Any, **more: Any,
    ) -> Any:  # fmt: skip
        keys.measure(self, query)
        if attn_metadata is None or attn_metadata.max_query_len == 1:
            return forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *rest, **more)
        return output.zero_()

    def synthetic_update(self: Any, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        if key.shape[0] > SPAN and not (key.is_cuda and torch.cuda.is_current_stream_capturing()):
            key = keys.draw(self, key, slot_mapping)
        update(self, layer, key, value, kv_cache, slot_mapping)

    FlashAttentionImpl.forward, FlashAttentionImpl.do_kv_cache_update = cheap_forward, synthetic_update
    try:
        yield
    finally:
        FlashAttentionImpl.forward, FlashAttentionImpl.do_kv_cache_update = forward, update
    if not keys.drawn:
        raise ConfigError("--peaked needs attention layers that run FlashAttention; leave --peaked out.")


class _Keys:
    """Random keys for the layers of one engine."""

    def __init__(self, logit_std: float, seed: int) -> None:
        self.logit_std, self.seed, self.drawn = logit_std, seed, 0
        self.lengths: dict[Any, Any] = {}
        self.table: Any = None

    def measure(self, impl: Any, query: Any) -> None:
        """Note the mean length of a layer's queries [T, Hq, D], once: at vLLM's profiling run or the first prompt."""
        if impl not in self.lengths:
            self.lengths[impl] = query.float().norm(dim=-1).mean()

    def draw(self, impl: Any, key: Any, slots: Any) -> Any:
        """Keys like `key` [T, H, D] for the cache slots [T]; `key` itself before the queries' length is known."""
        import torch

        if impl not in self.lengths:
            return key
        if self.table is None:
            self.generator = torch.Generator(key.device).manual_seed(self.seed)
            self.table = torch.randn((TABLE, *key.shape[1:]), generator=self.generator, device=key.device)
        count = min(slots.shape[0], key.shape[0])
        own = torch.randn((count, *key.shape[1:]), generator=self.generator, device=key.device)
        shared = self.table[(slots[:count].clamp(min=0) // SPAN) % TABLE]
        drawn = key.clone()
        unit = self.logit_std / (self.lengths[impl] * impl.scale)
        drawn[:count] = unit * (SHARED**0.5 * shared + (1 - SHARED) ** 0.5 * own)
        self.drawn += count
        return drawn
