"""Random MoE models whose routing does not depend on rounding."""

from __future__ import annotations

from pathlib import Path

import torch


def far_apart(model: Path, experts: int, single: bool = False) -> Path:
    """Let the token alone decide its experts, with steps between the logits that rounding cannot cross.

    The first channels hold a permutation of equal steps for each token, no layer writes to them, and routers see
    nothing else. Otherwise two kernels choose other experts now and then, and texts part for good.

    Args:
        model: directory of a model with one weight file, which is replaced.
        experts: E.
        single: tokens of odd number get one positive logit; gates cut at 0.5 then leave them one expert.
    """
    from safetensors.torch import load_file, save_file

    (file,) = model.glob("*.safetensors")
    weights = load_file(file)
    generator = torch.Generator().manual_seed(5)
    table = weights["model.embed_tokens.weight"]
    steps = torch.linspace(-2, 2, experts) * table.float().std()
    order = torch.stack([torch.randperm(experts, generator=generator) for _ in range(len(table))])
    table[:, :experts] = steps[order].to(table.dtype)
    if single:
        table[1::2, :experts] -= (steps[-1] + steps[-2]).to(table.dtype) / 2
    for name, w in weights.items():
        if name.endswith((".o_proj.weight", ".down_proj.weight")):
            w[:experts] = 0
        elif name.endswith(".mlp.gate.weight"):
            w.zero_()[:, :experts].fill_diagonal_(2.0)
    save_file(weights, file, metadata={"format": "pt"})
    return model
