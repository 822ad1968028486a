"""`sonic_moe`: grouped GEMMs with gather and SwiGLU inside, in place of vLLM's Triton experts (arXiv 2512.14080)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_ext.moe.method import LayerFacts, MoEMethod
from vllm_ext.moe.shape import Shape, from_config
from vllm_ext.moe.sonic_table import Table, find
from vllm_ext.options import ConfigError, option

if TYPE_CHECKING:
    import torch

CAPABILITY = (9, 0)
"""Compute capability that the kernels are written for."""


@dataclass(frozen=True)
class SonicMoE(MoEMethod):
    """The inference half of SonicMoE: sections 4.1 (gather in the load, activation in the epilogue) and 4.2.

    Same results as vLLM's experts up to rounding. Calls run on these kernels where the table of tiles says that they
    are faster than vLLM's tuned ones, and on vLLM's own elsewhere. On CPUs, the specification in PyTorch.
    """

    name: ClassVar[str] = "sonic_moe"

    table: str | None = option(None, "file of `vllm-ext moe tune --sonic`; null = the package's, for measured shapes")
    calls: str = option("measured", "calls served: where measured to be faster, or all", choices=("measured", "all"))

    def check(self, vllm_config: Any) -> None:
        """See MoEMethod; also the dtype, the GPU, the sizes, and that tiles are known."""
        super().check(vllm_config)
        model = vllm_config.model_config
        if model.quantization is not None:
            raise ConfigError(
                f"sonic_moe serves bfloat16 and float16 experts, not {model.quantization} ones; drop the plugin."
            )
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            return
        if not current_platform.is_cuda() or not current_platform.has_device_capability(CAPABILITY):
            raise ConfigError("sonic_moe is written for NVIDIA Hopper GPUs (sm_90) or later; drop the plugin here.")
        if str(model.dtype).removeprefix("torch.") not in ("bfloat16", "float16"):
            raise ConfigError(f"sonic_moe serves bfloat16 and float16, not {model.dtype}; add --dtype bfloat16.")
        shape = _shape(vllm_config)
        _check_sizes(shape)
        self._table(shape)

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """See MoEMethod."""
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            return super().banner(vllm_config) | {"kernels": "none on CPUs: the specification in PyTorch"}
        served = self._table(_shape(vllm_config)).served()
        where = "all calls" if self.calls == "all" else f"measured at {_range(served)} tokens, vLLM's kernels elsewhere"
        return super().banner(vllm_config) | {"kernels": where}

    def _table(self, shape: Shape) -> Table:
        """The table of tiles of this GPU.

        Raises:
            ConfigError: there is none and the plugin may only serve what was measured.
        """
        from vllm.platforms import current_platform

        device = current_platform.get_device_name()
        table = find(shape, device, self.table)
        if not table.rows and self.calls == "measured":
            raise ConfigError(
                f"sonic_moe has no measured tiles for experts of {shape} on {device}; make them with "
                "`vllm-ext moe tune MODEL --sonic` and give the file as sonic_moe.table, or set sonic_moe.calls=all."
            )
        return table

    def experts(self, layer: LayerFacts) -> SonicExperts | ReferenceExperts:
        """See MoEMethod."""
        import torch
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            return ReferenceExperts()
        shape = Shape(layer.local_experts, layer.top_k, layer.hidden_size, layer.intermediate_size)
        _check_sizes(shape)
        assert layer.dtype in (torch.bfloat16, torch.float16)
        return SonicExperts(shape, self._table(shape), self.calls == "all", layer.expert_ranks)

    def loaded(self, worker: Any, layers: Sequence[Any]) -> None:
        """See MoEMethod; compiles every kernel that a call can need, so that no request waits for a compiler."""
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            return
        from vllm_ext.moe.sonic_warmup import compile_kernels

        for layer in layers:
            kernel = getattr(layer.routed_experts.quant_method, "kernel", None)
            if isinstance(kernel, SonicExperts):
                compile_kernels(kernel, layer)
                return  # the layers of a model have one shape


@dataclass
class SonicExperts:
    """See method.ExpertsKernel. Of `ranks` that share the experts out, one computes its share of a call's pairs.

    The table was measured with all pairs on the rank, so it is read at that share of the tokens.
    """

    shape: Shape
    table: Table
    everything: bool
    ranks: int = 1
    skips: bool = True

    def covers(self, tokens: int) -> bool:
        """See method.ExpertsKernel."""
        return self.everything or self.table.covers(self._share(tokens))

    def tiles(self, tokens: int) -> Any:
        """Measured tiles, or the general rule for a shape without."""
        from vllm_ext.kernels.sonic_moe import default_tiles

        share = self._share(tokens)
        return self.table.tiles(share) if self.table.rows else default_tiles(share * self.shape.k / self.shape.experts)

    def _share(self, tokens: int) -> int:
        return -(-tokens // self.ranks)

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
        """See method.ExpertsKernel."""
        from vllm_ext.kernels.sonic_moe import sonic_moe

        sonic_moe(
            hidden, w13, w2, topk_weights, topk_ids, self.tiles(hidden.shape[0]),
            expert_map=expert_map, out=out, y1=workspace13, y2=workspace2,
        )  # fmt: skip


@dataclass
class ReferenceExperts:
    """The kernels' specification, for CPUs; see method.ExpertsKernel."""

    skips: bool = True

    def covers(self, tokens: int) -> bool:
        """Every call: CPUs keep the weights as the checkpoint has them."""
        return True

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
        """See method.ExpertsKernel."""
        from vllm_ext.kernels.reference_moe import moe

        out.copy_(moe(hidden, w13, w2, topk_weights, topk_ids, expert_map))


def _shape(vllm_config: Any) -> Shape:
    """The expert layer of a rank: vLLM spreads it over all ranks of tensor, context and data parallelism."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config.hf_text_config
    ranks = parallel.tensor_parallel_size * parallel.prefill_context_parallel_size * parallel.data_parallel_size
    if not parallel.enable_expert_parallel:
        return from_config(model, ranks)
    whole = from_config(model)
    return replace(whole, experts=-(-(whole.experts + parallel.eplb_config.num_redundant_experts) // ranks))


def _check_sizes(shape: Shape) -> None:
    from vllm_ext.kernels.sonic_moe import supports

    if reason := supports(shape.d, shape.n):
        raise ConfigError(f"sonic_moe: {reason}; use fewer tensor-parallel ranks, or drop the plugin.")


def _range(served: list[int]) -> str:
    """Numbers of tokens as text."""
    return f"{served[0]} to {served[-1]}" if served else "no number of"
