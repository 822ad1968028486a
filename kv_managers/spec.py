"""Scheduler side: the KV-cache spec of compressed layers and the manager that frees their blocks.

vLLM finds the manager through the spec's class (`KVCacheSpecRegistry`). Both run in the engine-core process and see
counts only (`counts.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_ext.kv_managers.counts import Counts

_STOCK = tuple(f.name for f in fields(FullAttentionSpec))


@dataclass(frozen=True, kw_only=True)
class EvictionSpec(FullAttentionSpec):
    """A full-attention spec whose requests keep `counts` tokens.

    Attributes:
        counts: of this group.
        strictest: per group of the model, its counts; a prefix hit must suit all of them.
        in_flight: see `Counts.most_resident`. The manager's constructor gets no configuration, so it is carried here.
        longest: max_model_len.
    """

    counts: Counts
    groups: tuple[Counts, ...]
    in_flight: int
    longest: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, **own: Any) -> EvictionSpec:
        """`spec` with our fields."""
        return cls(**{name: getattr(spec, name) for name in _STOCK}, **own)

    @property
    def most_blocks(self) -> int:
        """Blocks that one request ever holds at once."""
        return min(cdiv(self.counts.most_resident(self.longest, self.in_flight), self.block_size) + 1,
                   cdiv(self.longest, self.block_size))  # fmt: skip

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """What one request of max_model_len tokens needs; vLLM refuses to start with less."""
        return self.most_blocks * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Layers of different budgets never share a block table."""
        return all(isinstance(s, EvictionSpec) and s.counts == self.counts for s in kv_cache_specs.values())

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """The spec of a group; the parent's version would lose our fields."""
        assert len({s.counts for s in specs}) == 1
        merged = FullAttentionSpec.merge([FullAttentionSpec(**{n: getattr(s, n) for n in _STOCK}) for s in specs])
        own = {n: getattr(specs[0], n) for n in ("counts", "groups", "in_flight", "longest")}
        return cls.of(merged, **own)


class EvictionManager(FullAttentionManager):
    """Frees the blocks before a request's first resident slot; what eviction writes stays out of the prefix cache."""

    kv_cache_spec: EvictionSpec

    def __init__(self, kv_cache_spec: EvictionSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.counts = kv_cache_spec.counts
        self.max_admission_blocks_per_request = kv_cache_spec.most_blocks
        self.blocks_freed = 0
        self._processed: dict[str, tuple[int, int]] = {}
        self._requests: dict[str, Any] = {}

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], block_pool: Any,
        kv_cache_spec: EvictionSpec, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """The stock lookup, capped. Only new requests look up, and theirs covers all but the last prompt token."""
        if 0 in kv_cache_group_ids:  # asked first; its answer bounds the lookups of the other groups
            limits = [counts.longest_hit(max_length + 1) for counts in kv_cache_spec.groups]
            max_length = min([max_length, *(n for n in limits if n is not None)])
        return super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )

    def cache_blocks(self, request: Any, num_tokens: int, retention_interval: int | None = None, **kwargs: Any) -> None:
        """Publish full-precision blocks that no eviction will write to."""
        self._requests[request.request_id] = request
        limit = self.counts.publishable(request.num_prompt_tokens)
        if limit is not None:
            num_tokens = min(num_tokens, limit)
        super().cache_blocks(request, num_tokens, retention_interval, **kwargs)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what is no longer resident.

        The worker evicts at the start of the request's next step. So what `n` computed tokens make superfluous is free
        once a step that began with at least `n` tokens is complete: one step behind.
        """
        if num_prompt_tokens is None:
            return
        before, last = self._processed.get(request_id, (0, 0))
        if processed_computed_tokens != last:
            before, last = last, processed_computed_tokens
            self._processed[request_id] = before, last
        start = self.counts.start(before, num_prompt_tokens)
        if start:
            free = self.block_pool.get_num_free_blocks()
            self._remove_blocks_in_range(request_id, 0, start // self.block_size)
            self.blocks_freed += self.block_pool.get_num_free_blocks() - free

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """Forget the request. A preempted one takes no hits again: its lookup would not tell how long the prompt is."""
        self._processed.pop(request_id, None)
        request = self._requests.pop(request_id, None)
        if request is not None:
            request.skip_reading_prefix_cache = True
        return super().pop_blocks_for_free(request_id)


def _register() -> None:
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    # The built-in specs register themselves, but only into an empty registry.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(EvictionSpec, EvictionManager, uniform_type_base_spec=FullAttentionSpec)


_register()  # a spec reaches the scheduler's process as a pickle: importing its class must be enough
