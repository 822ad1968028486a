"""What an MoE plugin declares: its options, and which slots of an MoE layer it fills.

A layer runs router -> observers -> experts. A plugin fills a slot by returning a callable for it; a slot that nobody
fills stays stock. `loaded` hands it all layers at once, for what spans layers: traces, look-ahead, placement, caches.
No torch or vLLM import here: the classes are read while vLLM's command line is being built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

NO_EXPERT = -1
"""Expert id of a column that a token does not use; its weight is 0."""


@dataclass(frozen=True)
class LayerFacts:
    """One MoE layer of this rank.

    Attributes:
        name: vLLM's name of the layer; "" where it is not known yet (`MoEMethod.experts`).
        index: its number in the model, counting all layers; -1 where it is not known yet.
        num_experts: routed (logical) experts E, over all ranks.
        top_k: experts a token, K.
        hidden_size: d.
        intermediate_size: width n of an expert on this rank.
        renormalize: whether the model scales the K weights to sum 1.
        dtype, device: of the activations.
        max_tokens: most rows of one call.
        expert_ranks: ranks that share the experts out (expert parallelism); 1 = every rank has a part of each.
        redundant_experts: second copies of experts, over all ranks (EPLB).
    """

    name: str
    index: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    renormalize: bool
    dtype: torch.dtype
    device: Any
    max_tokens: int
    expert_ranks: int = 1
    redundant_experts: int = 0

    @property
    def local_experts(self) -> int:
        """Experts that a rank holds, at most."""
        return -(-(self.num_experts + self.redundant_experts) // self.expert_ranks)


class Routing(Protocol):
    """A router: which experts, and how much of each. Runs inside CUDA graphs: no host read-back, fixed shapes."""

    width: int
    """Columns W of what it returns; K for all but routers that give a token a variable number of experts."""

    def __call__(self, hidden: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Hidden states [T, d] and gate logits [T, E] -> weights [T, W] fp32, expert ids [T, W] int32.

        None leaves this call to the model's router; whether it does may depend on T alone. A column without an
        expert has id NO_EXPERT and weight 0. The layer gives it a valid id where the experts
        kernel cannot skip it, which changes no result.
        """


class ExpertsKernel(Protocol):
    """An experts kernel of unquantized gated (SwiGLU) experts."""

    skips: bool
    """Whether pairs with id NO_EXPERT are left out. A kernel that does not skip never sees one."""

    def covers(self, tokens: int) -> bool:
        """Whether it serves a call of that many rows; the others run stock. On CPUs it must cover every call."""

    def __call__(
        self,
        out: torch.Tensor,
        hidden: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
    ) -> None:
        """`out[t] = sum_j weight[t, j] * w2[e] (silu(w13[e, :n] x_t) * (w13[e, n:] x_t))`, e = local id of the pair.

        Args:
            out: [T, d], written. May overlap workspace13 (vLLM reuses that memory), so write it last.
            hidden: [T, d] contiguous, bf16 or fp16 (fp32 on CPUs).
            w13: [E_local, 2n, d], gate rows first, then up rows; contiguous.
            w2: [E_local, d, n] contiguous.
            topk_weights: [T, W] fp32.
            topk_ids: [T, W] int32, ids over all ranks' (physical) experts.
            expert_map: [E] int32, id -> local id or -1 for an expert of another rank; None = identity. Pairs of
                other ranks add nothing.
            workspace13: scratch of at least T * W * max(n, d) elements of hidden's dtype (CUDA; empty on CPUs).
            workspace2: scratch of at least T * W * max(2n, d) elements (CUDA; empty on CPUs).
        """


class Observer(Protocol):
    """Sees every routing decision, inside CUDA graphs: e.g. a trace, a load predictor, a prefetcher."""

    def __call__(
        self, hidden: torch.Tensor, logits: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> None:
        """Hidden [T, d], logits [T, E], weights [T, W] fp32, logical expert ids [T, W] int32 (NO_EXPERT = none)."""


@dataclass(frozen=True)
class MoEMethod:
    """Options and slots of one MoE plugin; several may be on together, as long as each slot has one owner."""

    kind: ClassVar[str] = "moe"
    routes: ClassVar[bool] = False
    """Whether `routing` replaces the model's router."""
    observes: ClassVar[bool] = False
    """Whether it adds observers; like a router, these need an experts kernel that takes expert ids."""

    @classmethod
    def plugin_name(cls) -> str:
        """Name in plugins.yaml and on the command line."""
        return getattr(cls, "name", cls.__name__.lower())

    def routing(self, layer: LayerFacts) -> Routing | None:
        """The router of a layer, or None for the model's own. May allocate; runs once, on the layer's device."""
        return None

    def experts(self, layer: LayerFacts) -> ExpertsKernel | None:
        """The experts kernel of a layer, or None for vLLM's own. `layer.name` and `layer.index` are not known yet."""
        return None

    def loaded(self, worker: Any, layers: Sequence[Any]) -> None:
        """Called in each worker when the model is built, before its first forward pass.

        Args:
            worker: vLLM's worker; `worker.model_runner` is set.
            layers: the MoE layers of this rank's model in order (`layers.Runner`); `layer.facts` describes one, and an
                `Observer` in `layer.router.observers` sees its routing.
        """

    def attach(self, worker: Any) -> None:
        """Called once in each worker process, before its model is built; `worker.vllm_config` is the configuration."""
        from vllm_ext.moe import layers

        layers.install(worker)

    def engine_args(self) -> dict[str, Any]:
        """Stock vLLM engine arguments that this plugin needs."""
        return {}

    def check(self, vllm_config: Any) -> None:
        """Refuse a model or configuration that the plugin cannot serve.

        Args:
            vllm_config: the finished VllmConfig, before any weight is loaded.

        Raises:
            ConfigError: one sentence that names the option and the remedy.
        """
        from vllm_ext.moe.limits import check

        check(self, vllm_config)

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """What the start-up banner says of this plugin, label -> text."""
        from vllm_ext.moe.limits import banner

        return banner(self, vllm_config)

    def options(self) -> dict[str, Any]:
        """The options as a plain mapping (JSON types)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
