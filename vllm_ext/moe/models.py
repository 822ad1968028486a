"""Small MoE models without a model hub: a dense Llama upcycled into experts, and random ones of each family.

Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints (Komatsuzaki et al., ICLR 2023), section 2.1.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ext.moe.checkpoint import LAYOUTS, Experts, Writer, expert_tensors
from vllm_ext.options import ConfigError

if TYPE_CHECKING:
    import torch


def upcycle(
    dense: Path, out: Path, *, experts: int = 8, top_k: int = 2, noise: float = 0.0, router: float = 0.02, seed: int = 0
) -> Path:
    """Write a Mixtral whose experts are copies of a Llama's MLPs, behind random routers, and return `out`.

    Args:
        dense: Hugging Face directory of a Llama.
        out: directory to make.
        experts, top_k: E and K.
        noise: standard deviation of Gaussian noise on every expert but the first, in units of each matrix's own. With 0
            the model computes what the dense one does, whatever the router picks: top-k weights sum to 1.
        router: standard deviation of the gate weights.
        seed: of gate and noise.

    Raises:
        ConfigError: not a Llama, or impossible counts.
    """
    import torch
    from safetensors.torch import load_file

    config = llama_config(dense)
    if not 1 <= top_k <= experts:
        raise ConfigError(f"--top-k must be between 1 and --experts ({experts}), got {top_k}.")
    for option, value in (("noise", noise), ("router", router)):
        if not 0 <= value < float("inf"):
            raise ConfigError(f"--{option} must be at least 0, got {value}.")
    generator = torch.Generator().manual_seed(seed)
    weights = {k: w for p in sorted(dense.glob("*.safetensors")) for k, w in load_file(p).items()}
    writer = Writer(out, dense)
    writer.add({k: w for k, w in weights.items() if ".mlp." not in k})
    for layer in range(config["num_hidden_layers"]):
        stacks = []
        for part in ("gate_proj", "up_proj", "down_proj"):
            weight = weights[f"model.layers.{layer}.mlp.{part}.weight"]
            stacks.append(torch.stack([weight, *(_noisy(weight, noise, generator) for _ in range(experts - 1))]))
        gate = torch.randn(experts, config["hidden_size"], generator=generator) * router
        block = Experts(gate.to(stacks[0].dtype), *stacks)
        writer.add(expert_tensors(LAYOUTS["mixtral"], layer, block))
    return writer.close(config | family_config("mixtral", experts, top_k, config["intermediate_size"]))


def _noisy(weight: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    import torch

    if not noise:
        return weight
    wide = weight.float()
    return (wide + torch.randn(wide.shape, generator=generator) * wide.std() * noise).to(weight.dtype)


def llama_config(dense: Path) -> dict[str, Any]:
    """config.json of a Llama's directory; ConfigError if it is another model."""
    try:
        config = json.loads((dense / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{dense}' has no readable config.json ({error}); give a Llama's directory.") from None
    if config.get("model_type") != "llama":
        raise ConfigError(f"'{dense}' is a {config.get('model_type')} model; only a dense Llama can be upcycled.")
    return config


def family_config(family: str, experts: int, top_k: int, width: int) -> dict[str, Any]:
    """Config keys that make a Llama's config one of an MoE family."""
    layout = LAYOUTS[family]
    config: dict[str, Any] = {layout.count: experts, layout.width: width, "num_experts_per_tok": top_k}
    config |= {"model_type": family, "sliding_window": None, "output_router_logits": False}
    if family == "mixtral":
        return config | {"architectures": ["MixtralForCausalLM"]}
    if family == "olmoe":
        return config | {"architectures": ["OlmoeForCausalLM"], "norm_topk_prob": False, "clip_qkv": None}
    return config | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def tiny_moe(
    out: Path,
    family: str = "mixtral",
    *,
    experts: int = 8,
    top_k: int = 2,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    dtype: str = "float32",
    seed: int = 0,
    **shape: Any,
) -> Path:
    """Write a random MoE model without a tokenizer (load it with `skip_tokenizer_init=True`) and return `out`.

    Args:
        out: directory to make.
        family: "mixtral", "qwen3_moe" or "olmoe".
        experts, top_k, width: E, K and n.
        layers, heads, dtype, seed, shape: as in `vllm_ext.models.tiny_llama`.
    """
    import torch
    from safetensors.torch import load_file

    from vllm_ext.models import tiny_llama

    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        # OLMoE has no grouped-query attention
        kv_heads = heads if family == "olmoe" else heads // 2
        dense = tiny_llama(
            Path(scratch), layers=layers, heads=heads, kv_heads=kv_heads, dtype=dtype, seed=seed, **shape
        )
        config = json.loads((dense / "config.json").read_text())
        weights = {k: w for k, w in load_file(dense / "model.safetensors").items() if ".mlp." not in k}
        writer = Writer(out, dense)
        generator = torch.Generator().manual_seed(seed + 1)
        d, head = config["hidden_size"], config["head_dim"]
        if family == "olmoe":
            config["head_dim"] = head = d // heads

        def random(*size: int) -> torch.Tensor:
            return (torch.randn(size, generator=generator) / size[-1] ** 0.5).to(getattr(torch, dtype))

        for layer in range(layers):
            attention = f"model.layers.{layer}.self_attn."
            if family == "olmoe":
                weights |= {f"{attention}{p}_proj.weight": random(d, d) * 2 for p in "qkvo"}
            if family != "mixtral":
                size = d if family == "olmoe" else head
                weights |= {f"{attention}{p}_norm.weight": torch.ones(size, dtype=getattr(torch, dtype)) for p in "qk"}
            block = Experts(
                random(experts, d) * 2,
                random(experts, width, d) * 2,
                random(experts, width, d) * 2,
                random(experts, d, width) * 2,
            )
            weights |= expert_tensors(LAYOUTS[family], layer, block)
        writer.add(weights)
        return writer.close(config | family_config(family, experts, top_k, width))
