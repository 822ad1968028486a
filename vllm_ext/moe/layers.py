"""The one replacement of vLLM's MoE layer classes: it asks the selected plugins for each slot and is stock elsewhere.

vLLM's registry of out-of-tree layers takes one class a name and process, so all MoE plugins share these two.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe import MoERunner, RoutingMethodType, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

from vllm_ext import workers
from vllm_ext.moe.method import ExpertsKernel, LayerFacts, MoEMethod, Observer, Routing
from vllm_ext.options import ConfigError


def selected() -> list[MoEMethod]:
    """The MoE plugins of the engine that is being built."""
    from vllm_ext.config import from_additional

    plugins = from_additional(get_current_vllm_config().additional_config).values()
    return [p for p in plugins if isinstance(p, MoEMethod)]


def install(worker: Any) -> None:
    """Register the layer classes in this process, and call the plugins' `loaded` when `worker` has its model.

    Raises:
        ConfigError: another package has replaced vLLM's MoE layers.
    """
    for name, base, cls in (
        ("MoERunner", MoERunner, Runner),
        ("UnquantizedFusedMoEMethod", UnquantizedFusedMoEMethod, UnquantizedMethod),
    ):
        if name not in op_registry_oot:
            workers.undo.append(functools.partial(op_registry_oot.pop, name))
        if op_registry_oot.setdefault(name, cls) is not cls:
            other = op_registry_oot[name]
            raise ConfigError(
                f"MoE plugins cannot replace vLLM's {base.__name__}, which {other.__module__} has replaced already; "
                "uninstall that package, or drop the MoE plugins."
            )
    if "load_model" not in vars(worker):
        worker.load_model = _then_loaded(worker, worker.load_model)


def _then_loaded(worker: Any, load_model: Any) -> Any:
    @functools.wraps(load_model)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = load_model(*args, **kwargs)
        layers = moe_layers(worker.get_model())
        if not layers:
            raise ConfigError(
                f"{worker.model_config.model} builds its MoE layers from a class of its own, which MoE plugins cannot "
                "serve; drop them from --plugins."
            )
        from vllm_ext.config import from_additional

        for plugin in from_additional(worker.vllm_config.additional_config).values():
            if isinstance(plugin, MoEMethod):
                plugin.loaded(worker, layers)
        return result

    return wrapper


class Runner(MoERunner):
    """vLLM's MoE layer with the router of a plugin, or its own, in front of observers."""

    def __init__(self, layer_name: str, moe_config: Any, router: Any, routed_experts: Any, **kwargs: Any) -> None:
        self_facts = facts(moe_config, routed_experts.renormalize, layer_name)
        kernel = getattr(routed_experts.quant_method, "kernel", None)
        _check_kernel(selected(), routed_experts.quant_method)
        router = Router(router, self_facts, bool(kernel and kernel.skips), routed_experts)
        super().__init__(layer_name, moe_config, router, routed_experts, **kwargs)
        self.facts = self_facts


class Router(BaseRouter):
    """A plugin's routing where there is one, else the model's router; then the observers.

    What vLLM hangs on a router stays in the base class: capture for `--enable-return-routed-experts`, and EPLB's map
    from logical to physical experts.
    """

    def __init__(self, stock: Any, layer: LayerFacts, skips: bool, routed_experts: Any) -> None:
        super().__init__(layer.top_k, stock.global_num_experts, stock.eplb_state)
        found = [(p, r) for p in selected() if (r := p.routing(layer)) is not None]
        if len(found) > 1:
            names = " and ".join(p.plugin_name() for p, _ in found)
            raise ConfigError(f"plugins {names} both replace the router; keep one of them in --plugins.")
        self.routing: Routing | None = found[0][1] if found else None
        self.observers: list[Observer] = []
        self.skips = skips
        self.stock = stock
        if found:
            _check_router(found[0][0], stock, routed_experts)
        elif isinstance(stock, ZeroExpertRouter):
            raise ConfigError(f"MoE plugins do not support models with zero experts (layer {layer.name}); drop them.")

    @property
    def width(self) -> int:
        """Columns of the ids."""
        return self.routing.width if self.routing else self.top_k

    @property
    def routing_method_type(self) -> RoutingMethodType:
        """Custom where a plugin routes: a kernel that routes by itself must not be chosen."""
        return RoutingMethodType.Custom if self.routing else self.stock.routing_method_type

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        routed = self.routing(hidden_states, router_logits) if self.routing else None
        own = routed is None
        if routed is None:
            routed = self.stock._compute_routing(hidden_states, router_logits, indices_type, input_ids=input_ids)
        weights, ids = routed
        for observer in self.observers:
            observer(hidden_states, router_logits, weights, ids)
        if not own and (self.capture_fn is not None or not self.skips):
            ids = filled(ids)
        return weights, ids if indices_type is None else ids.to(indices_type)


def filled(ids: torch.Tensor) -> torch.Tensor:
    """[T, W] expert ids, with the token's first one in columns that are not used: their weight is 0, so any would do.

    One expert for all of them would get their rows, and their load in EPLB's eyes.
    """
    return torch.where(ids < 0, ids[:, :1].clamp(min=0), ids)


def _check_router(plugin: MoEMethod, stock: Any, routed_experts: Any) -> None:
    """Refuse a router plugin where the model's own routing is more than a top-k of its logits, or is not called."""
    name = plugin.plugin_name()
    special = {
        "grouped experts": routed_experts.use_grouped_topk,
        "a correction bias": routed_experts.e_score_correction_bias is not None,
        "its own routing function": routed_experts.custom_routing_function is not None,
        "zero experts": isinstance(stock, ZeroExpertRouter),
        "a scaled routed output": routed_experts.routed_scaling_factor != 1.0,
        f"the {routed_experts.scoring_func} scores": routed_experts.scoring_func != "softmax",
        "experts chosen by token id": routed_experts.moe_config.has_hash_routing,
    }
    if found := [text for text, present in special.items() if present]:
        raise ConfigError(f"--plugins {name} cannot honour {found[0]} of this model's router; drop the plugin.")


def _check_kernel(plugins: Sequence[MoEMethod], quant_method: Any) -> None:
    """Refuse kernels that choose the experts themselves: they would pass by routers and observers without a word."""
    names = [p.plugin_name() for p in plugins if p.routes or p.observes]
    if names and quant_method.is_monolithic:
        raise ConfigError(
            f"--plugins {names[0]} needs an experts kernel that takes expert ids, and the one that vLLM chose routes "
            "by itself; add --moe-backend triton."
        )


class UnquantizedMethod(UnquantizedFusedMoEMethod):
    """vLLM's unquantized experts, with the experts kernel of a plugin where there is one."""

    def __init__(self, moe: Any) -> None:
        super().__init__(moe)
        found = [(p, k) for p in selected() if (k := p.experts(facts(moe))) is not None]
        plain = moe.activation == MoEActivation.SILU and not moe.has_bias and moe.swiglu_limit is None
        if found and not plain:
            raise ConfigError(
                f"--plugins {found[0][0].plugin_name()} serves SwiGLU experts without bias or limit, not this model's "
                f"{moe.activation.value} experts; drop the plugin."
            )
        if len(found) > 1:
            names = " and ".join(p.plugin_name() for p, _ in found)
            raise ConfigError(f"plugins {names} both replace the experts kernel; keep one of them in --plugins.")
        self.kernel: ExpertsKernel | None = None
        if found:
            plugin, self.kernel = found[0]
            stock: Any = vars(self)["experts_cls"]
            self.experts_cls = experts_class(stock, self.kernel, plugin.plugin_name())


def experts_class(stock: Any, kernel: ExpertsKernel, plugin: str) -> Any:
    """vLLM's experts class `stock` with `kernel` for the calls that it covers.

    Raises:
        ConfigError: `stock` keeps the weights in a layout of its own.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    if issubclass(stock, CPUUnquantizedExperts):
        mixins: tuple[type, ...] = (_PlainWeights, _Experts)
    elif stock is TritonExperts:
        mixins = (_Experts,)
    else:
        raise ConfigError(f"--plugins {plugin} cannot stand in for {stock.__name__}; add --moe-backend triton.")
    return type(f"Plugin{stock.__name__}", (*mixins, stock), {"kernel": kernel})


class _Experts:
    """`apply` of an experts class, handed to the kernel of a plugin."""

    kernel: ExpertsKernel

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> Any:
        """See `FusedMoEExpertsModular.apply`."""
        if self.kernel.covers(hidden_states.shape[0]) and not apply_router_weight_on_input:
            self.kernel(
                output, hidden_states, w1, w2, topk_weights, topk_ids, expert_map,
                workspace13.view(-1), workspace2.view(-1),
            )  # fmt: skip
            return None
        if self.kernel.skips:
            topk_ids = filled(topk_ids)  # the stock kernel cannot skip
        return super().apply(  # type: ignore[misc]
            output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
            a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input,
        )  # fmt: skip


class _PlainWeights:
    """Keeps the checkpoint's layout where the stock class packs the weights for its own kernel (CPUs)."""

    _use_zentorch = False

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing to pack."""


def facts(moe: Any, renormalize: bool = True, name: str = "") -> LayerFacts:
    """What plugins are told of a layer, from vLLM's FusedMoEConfig."""
    from vllm.model_executor.models.utils import extract_layer_index

    return LayerFacts(
        name=name,
        index=extract_layer_index(name) if name else -1,
        num_experts=moe.num_logical_experts,
        top_k=moe.experts_per_token,
        hidden_size=moe.hidden_dim,
        intermediate_size=moe.intermediate_size_per_partition,
        renormalize=renormalize,
        dtype=moe.in_dtype,
        device=moe.device,
        max_tokens=moe.max_num_tokens,
        expert_ranks=moe.ep_size,
        redundant_experts=moe.num_experts - moe.num_logical_experts,
    )


def moe_layers(model: Any) -> Sequence[Runner]:
    """The MoE layers of a model that was built with plugins, in model order."""
    return [m for m in model.modules() if isinstance(m, Runner)]
