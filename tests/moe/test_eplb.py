"""Expert load balancing behind a plugin's router: physical experts for the kernel, logical ones for who looks on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_ext.moe.method import LayerFacts, MoEMethod

PHYSICAL = torch.tensor([[0, 4], [5, -1], [2, 3], [1, -1]], dtype=torch.int64)
"""Six physical experts of four: [E, replicas], -1 = no second one."""
REPLICAS = torch.tensor([2, 1, 2, 1], dtype=torch.int64)


def mapped(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None,
) -> torch.Tensor:
    """vLLM's kernel for GPUs in PyTorch: the token's hash picks the replica; an id below 0 has none and counts not."""
    tokens = torch.arange(len(topk_ids))[:, None]
    known = topk_ids.clamp(min=0).long()
    replica = (tokens * 2654435769 & 0xFFFFFFFF) % logical_replica_count[known]
    physical = logical_to_physical_map[known, replica].masked_fill(topk_ids < 0, -1)
    if bool(record_enabled):
        expert_load_view += torch.bincount(physical[physical >= 0], minlength=len(expert_load_view))
    return physical.to(topk_ids.dtype)


class Half(MoEMethod):
    """A router that gives every second token one expert only."""

    width = 2
    routes = True

    def routing(self, layer: LayerFacts) -> Any:
        return self

    def __call__(self, hidden: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = logits.softmax(1).topk(2)
        odd = torch.arange(len(logits)) % 2 == 1
        weights[odd, 1] = 0
        ids[odd, 1] = -1
        return weights, ids.int()


@pytest.mark.parametrize("skips", [True, False])
def test_the_kernel_gets_physical_experts_and_the_trace_logical_ones(
    skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.eplb.eplb_state import EplbLayerState
    from vllm.model_executor.layers.fused_moe.router import base_router

    from vllm_ext.moe import layers

    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", mapped)
    monkeypatch.setattr(layers, "selected", lambda: [Half()])
    state = EplbLayerState()
    stock = SimpleNamespace(global_num_experts=6, eplb_state=state)
    plain = {"use_grouped_topk": False, "e_score_correction_bias": None, "custom_routing_function": None}
    experts = SimpleNamespace(**plain, routed_scaling_factor=1.0, scoring_func="softmax")
    experts.moe_config = SimpleNamespace(has_hash_routing=False)
    facts = LayerFacts("layers.0", 0, 4, 2, 8, 8, True, torch.float32, "cpu", 64)
    router = layers.Router(stock, facts, skips, experts)
    # vLLM fills the state of a layer when the model is loaded, long after the router was built
    load = torch.zeros(1, 6, dtype=torch.int64)
    state.set_layer_state(0, load, PHYSICAL[None], REPLICAS[None])
    state.should_record_tensor, state.num_unpadded_tokens_tensors = torch.tensor(True), [torch.tensor(16)]
    seen: list[torch.Tensor] = []
    router.observers.append(lambda hidden, logits, weights, ids: seen.append(ids))
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))

    weights, ids = router.select_experts(torch.zeros(16, 8), logits, torch.int32)

    logical = logits.topk(2).indices
    assert torch.equal(seen[0][::2].long(), logical[::2])
    assert bool((seen[0][1::2, 1] == -1).all())
    owner = torch.tensor([0, 3, 2, 2, 0, 1])  # of each physical expert
    assert torch.equal(owner[ids[:, 0].long()], logical[:, 0])
    assert torch.equal(owner[ids[::2, 1].long()], logical[::2, 1])
    # a kernel that cannot skip computes the first expert again, with weight 0
    assert torch.equal(ids[1::2, 1], torch.full((8,), -1, dtype=torch.int32) if skips else ids[1::2, 0])
    assert bool((weights[1::2, 1] == 0).all())
    assert set(ids[logical[:, 0] == 0, 0].tolist()) == {0, 4}  # both copies are used
    assert int(load.sum()) == (24 if skips else 32)
