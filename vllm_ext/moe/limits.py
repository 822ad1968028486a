"""What the MoE plugins refuse before weights are loaded, and what they say of themselves at start."""

from __future__ import annotations

from typing import Any

from vllm_ext.moe.method import MoEMethod
from vllm_ext.options import ConfigError

ROUTING_BACKENDS = ("flashinfer_trtllm", "aiter", "deep_gemm_mega_moe", "aiter_mega_moe")
"""Values of --moe-backend whose kernels choose the experts themselves."""

COMPATIBILITY = {
    "models": "in-tree MoE models (Mixtral, Qwen3-MoE, OLMoE, ...); dense ones are refused",
    "routers that group experts, add a bias or scale the output": "refused by router plugins, traced as they are",
    "quantized experts": "routers and traces work; experts kernels leave them stock",
    "kernels that route by themselves (monolithic)": "refused: --moe-backend triton",
    "tensor and expert parallelism, EPLB": "left to vLLM, behind the router: its maps and load counts stay its own",
    "expert parallelism on CPUs": "with sonic_moe; vLLM's own experts do not support it there",
    "--enable-return-routed-experts": "works; shows the plugin's choice",
    "CUDA graphs, torch.compile, model runners V1 and V2": "works",
    "chunked prefill, mixed batches, prefix caching, preemption": "works",
    "LoRA": "refused",
}
"""The compatibility table; `check` below and `layers._check_router` are its code."""


def _fail(text: str) -> None:
    raise ConfigError(text)


def check(plugin: MoEMethod, cfg: Any) -> None:
    """Raise ConfigError, one sentence with option and remedy, for whatever an MoE plugin cannot serve."""
    name, model = plugin.plugin_name(), cfg.model_config
    if model.runner_type != "generate" or not model.is_moe:
        _fail(f"--plugins {name} needs a mixture-of-experts model, which {model.model} is not; drop the plugin.")
    if cfg.lora_config is not None:
        _fail(f"--plugins {name} does not support LoRA adapters on MoE layers; drop --enable-lora or the plugin.")
    _check_expert_parallel(name, cfg)
    if not (plugin.routes or plugin.observes):
        return
    if cfg.kernel_config.moe_backend in ROUTING_BACKENDS:
        _fail(
            f"--plugins {name} needs an experts kernel that takes expert ids, and --moe-backend "
            f"{cfg.kernel_config.moe_backend} routes by itself; use --moe-backend triton."
        )
    if plugin.routes and (special := special_routing(model.hf_text_config)):
        _fail(f"--plugins {name} cannot honour {special} of {model.model}'s router; drop the plugin.")


def _check_expert_parallel(name: str, cfg: Any) -> None:
    """vLLM's experts for CPUs take the ids of other ranks' experts for their own, and crash."""
    from vllm.platforms import current_platform

    from vllm_ext.config import SECTION

    if not (current_platform.is_cpu() and cfg.parallel_config.enable_expert_parallel):
        return
    if "sonic_moe" not in cfg.additional_config.get(SECTION, {}):
        _fail(
            f"--plugins {name}: vLLM's experts on CPUs do not support --enable-expert-parallel; add sonic_moe to "
            "--plugins, or drop the flag."
        )


def special_routing(hf: Any) -> str:
    """What a model's router does beyond a top-k of softmax scores, as far as its config tells; "" if nothing."""
    if (getattr(hf, "n_group", None) or 0) > 1:
        return "the expert groups"
    if getattr(hf, "topk_method", None) == "noaux_tc" or getattr(hf, "e_score_correction_bias", None) is not None:
        return "the correction bias"
    if getattr(hf, "scoring_func", "softmax") != "softmax":
        return f"the {hf.scoring_func} scores"
    return ""


def banner(plugin: MoEMethod, cfg: Any) -> dict[str, str]:
    """Rows of the start-up banner."""
    model = cfg.model_config
    return {"experts": f"{model.get_num_experts_per_tok()} of {model.get_num_experts()} a token"}
