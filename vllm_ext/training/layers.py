"""How much of a budget each layer needs, by DefensiveKV's scores over texts (Feng et al., ICLR 2026).

Of each text, the best `ratio` of all layers' and heads' tokens is taken together; a layer's need is how many of them
are its.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_ext.evaluation.attention_error import output_weight
from vllm_ext.kv_managers.defensive_kv import DefensiveKV
from vllm_ext.kv_managers.fingerprint import fingerprint
from vllm_ext.kv_managers.layer_profile import LayerProfile, classes
from vllm_ext.kv_managers.view import KVView
from vllm_ext.training.model import Frozen, watched

Advance = Callable[[str, int, int], None]


@torch.no_grad()
def needs(model: Frozen, method: DefensiveKV, ids: Sequence[int]) -> list[float]:
    """Tokens that each layer holds of the best of one text, per KV head.

    Args:
        ids: the text; `method.ratio` of it is kept.
    """
    rows: list[Tensor] = []

    def watch(number: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        view = KVView.from_tensors(
            k, v, q[:, :, -method.window :].transpose(1, 2), scale=scale, budget=method.budget_for(len(ids)),
            output_weights=[output_weight(model, number)], layers=[number],
        )  # fmt: skip
        scores = method.score(view)[..., : -method.window]
        rows.append(scores.flatten().cpu())

    with watched(watch):
        model.body(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    every = torch.stack(rows)
    room = int(method.budget_for(len(ids)) - method.window) * model.shape.kv_heads * len(rows)
    best = torch.zeros(every.numel()).scatter_(0, every.flatten().topk(room).indices, 1.0)
    return (best.view_as(every).sum(-1) / model.shape.kv_heads + method.window).tolist()


def measure(
    model: Frozen, method: DefensiveKV, texts: Sequence[Sequence[int]], count: int, out: Path, advance: Advance
) -> LayerProfile:
    """Average the needs over texts, sort the layers into `count` classes, and write the profile to `out`."""
    layers = model.shape.layers
    classes([1.0] * layers, count)
    total = torch.zeros(layers, dtype=torch.float64)
    for number, ids in enumerate(texts):
        advance("texts", number, len(texts))
        total += torch.tensor(needs(model, method, ids), dtype=torch.float64)
    advance("texts", len(texts), len(texts))
    mean = (total / len(texts)).tolist()
    notes: dict[str, Any] = {"needs": [round(x, 1) for x in mean], "texts": len(texts), "length": len(texts[0])}
    notes |= {"ratio": method.ratio, "window": method.window}
    profile = LayerProfile(classes(mean, count), fingerprint(model.body.config.get_text_config()), notes)
    profile.save(out)
    return profile
