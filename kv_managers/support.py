"""What both platforms' backends share: the active method, the spec, the layers of a group, the steps of a worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_ext import kv_metrics
from vllm_ext.kv_managers import rows
from vllm_ext.kv_managers.compactor import Compactor, Layer
from vllm_ext.kv_managers.counts import Counts
from vllm_ext.kv_managers.method import KVMethod
from vllm_ext.kv_managers.spec import EvictionSpec
from vllm_ext.options import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig

_active: tuple[KVMethod, VllmConfig] | None = None
_asked = 0


def selected(vllm_config: VllmConfig) -> KVMethod:
    """The KV method that this configuration selects."""
    from vllm_ext.config import from_additional

    methods = [p for p in from_additional(vllm_config.additional_config).values() if isinstance(p, KVMethod)]
    if len(methods) != 1:
        raise ConfigError(
            f"the KV backend needs exactly one KV plugin and got {len(methods)}; select one with --plugins, e.g. "
            "--plugins snapkv."
        )
    return methods[0]


def activate(vllm_config: VllmConfig) -> KVMethod:
    """Remember configuration and method for `evicting_spec`, which gets neither."""
    global _active, _asked
    if _active is None or _active[1] is not vllm_config:
        _active, _asked = (selected(vllm_config), vllm_config), 0
    return _active[0]


def evicting_spec(spec: Any) -> Any:
    """The KV spec of the next attention layer; vLLM asks for every layer once, in model order, and names none."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    global _asked
    if type(spec) is not FullAttentionSpec or _active is None:
        return spec
    method, cfg = _active
    shares = method.layer_shares(cfg.model_config.get_num_layers(cfg.parallel_config))
    share = shares[_asked % len(shares)]
    _asked += 1
    return EvictionSpec.of(
        spec,
        counts=Counts(method, share),
        groups=tuple(Counts(method, s) for s in dict.fromkeys(shares)),
        in_flight=cfg.max_in_flight_tokens + cfg.scheduler_config.max_num_batched_tokens,
        longest=cfg.model_config.max_model_len,
    )


def ring_slots(method: KVMethod, vllm_config: VllmConfig) -> int:
    """Requests whose query windows are held at once.

    One-shot methods hold a window from the last chunk of a prompt to the next step. Prefix hits stop `budget` tokens
    before the end of a prompt, so that many tokens of a step belong to each prompt that ends in it, but for the last
    one.
    """
    if not method.needs_queries:
        return 0
    scheduler = vllm_config.scheduler_config
    if method.trigger != "prefill_end":
        return scheduler.max_num_seqs
    ending = 2 * (scheduler.max_num_batched_tokens // method.budget_for(1) + 1)
    return min(scheduler.max_num_seqs, ending)


def new_ring(impl: Any, dtype: torch.dtype) -> Tensor | None:
    """[slots, window, Hq, D] query windows of a layer; made with the weights, so that the memory profile sees it."""
    if _active is None or not _active[0].needs_queries:
        return None
    method, cfg = _active
    shape = (ring_slots(method, cfg), method.window, impl.num_heads, impl.head_size)
    return torch.zeros(shape, dtype=dtype, device=cfg.device_config.device)


@dataclass
class Steps:
    """The steps of one KV-cache group on a worker.

    Attributes:
        names: its attention layers.
        views: a layer's cache -> its keys and values, [num_blocks, H, P, D].
    """

    vllm_config: VllmConfig
    names: list[str]
    counts: Counts
    views: Callable[[Tensor], tuple[Tensor, Tensor]]
    fused: Any = None

    def __post_init__(self) -> None:
        method = self.counts.method
        slots = ring_slots(method, self.vllm_config)
        impl = self._attention()[self.names[0]].impl
        self.compactor = Compactor(
            self.counts, ring_slots=slots, scale=impl.scale, live=lambda: rows.live(rows.runner()), fused=self.fused
        )
        self.publisher = kv_metrics.Publisher(self.vllm_config, self.names[0])
        self.steps = 0

    def _attention(self) -> dict[str, Any]:
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention import Attention

        return get_layers_from_vllm_config(self.vllm_config, Attention, self.names)

    def begin(self, common: Any) -> tuple[list[int], list[tuple[int, int, int, int]]]:
        """Evict what is due.

        Returns:
            the first resident slot of every row, and what to record: (token of the batch, ring slot, position, count).
        """
        runner = rows.runner()
        batch = rows.read(common, runner)
        records = []
        if any(batch) and not self.compactor.layers:
            self.compactor.layers = self.layers(runner)
        queries = self.counts.method.needs_queries
        first_token = common.query_start_loc_cpu.tolist() if queries else []
        starts = self.compactor.begin_step(batch, common.block_table_tensor.__getitem__)
        for r, row in enumerate(batch):
            if row is not None and queries:
                ring, first, end = self.compactor.record_range(row)
                if end > first:
                    records.append((first_token[r] + first - row.before, ring, first, end - first))
        self.publisher.publish(self._totals())
        self.steps += 1
        if self.steps % 256 == 0:
            self.compactor.forget(rows.live(runner))
        return starts, records

    def _totals(self) -> dict[str, float]:
        t = self.compactor.totals
        return {
            "kv_compactions": t.compactions, "kv_tokens_kept": t.tokens_kept, "kv_tokens_dropped": t.tokens_dropped,
            "kv_blocks_freed": t.blocks_freed, "kv_compaction_seconds": t.seconds,
        }  # fmt: skip

    def layers(self, runner: Any) -> list[Layer]:
        """The layers of the group; their caches must be bound."""
        from vllm.model_executor.models.utils import extract_layer_index

        method = self.counts.method
        found = []
        for name, layer in self._attention().items():
            keys, values = self.views(layer.kv_cache)
            weight = _output_weight(runner, name, layer.impl) if method.needs_output_weight else None
            side = side_cache(layer, method) if method.side_values else None
            found.append(Layer(extract_layer_index(name), layer.kv_cache, keys, values, layer.impl.ring, side, weight))
        if self.fused is not None:
            self.fused.bind(found)
        return found


def side_cache(layer: Any, method: KVMethod) -> Tensor:
    """[num_blocks, H, P, side_values] fp32 values beside the KV cache of a layer, made on first use."""
    if layer.impl.side is None:
        blocks, heads, page, _ = layer.kv_cache.shape
        shape = (blocks, heads, page, method.side_values)
        layer.impl.side = torch.zeros(shape, dtype=torch.float32, device=layer.kv_cache.device)
    return layer.impl.side


def _output_weight(runner: Any, name: str, impl: Any) -> Callable[[], Tensor]:
    """The output projection behind an attention layer as slices [Hq, D, hidden]."""
    parent = runner.get_model().get_submodule(name.rsplit(".", 1)[0])
    weight = parent.o_proj.weight
    return lambda: weight.t().reshape(impl.num_heads, impl.head_size, -1)


def record_index(records: list[tuple[int, int, int, int]], window: int) -> tuple[list[int], list[int]]:
    """Tokens of the batch and the rows of the flattened ring [slots * window] that take their queries."""
    tokens: list[int] = []
    places: list[int] = []
    for token, ring, first, count in records:
        tokens += range(token, token + count)
        places += [ring * window + (first + i) % window for i in range(count)]
    return tokens, places


def store_side(side: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
    """Write the first rows of `values` [tokens, H, S] to the slots of a step; padding (-1) goes to the null block."""
    slots, page = slot_mapping.clamp(min=0), side.shape[2]
    heads = torch.arange(side.shape[1], device=side.device)[None]
    side[(slots // page)[:, None], heads, (slots % page)[:, None]] = values[: slots.shape[0]]
