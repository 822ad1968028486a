"""How far eviction moves the output of attention, layer by layer, with everything before the layer exact.

Of each text, a prompt is compressed; the tokens after it are teacher-forced with full attention, and every layer's
attention is computed once more from what the method would have kept: `e = ||o_full - o_kept|| / ||o_full||` behind the
output projection. Errors do not compound. Runs in transformers, without an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_ext.evaluation import stats
from vllm_ext.kernels import kv_reference as reference
from vllm_ext.kv_managers.counts import Counts
from vllm_ext.kv_managers.method import KVMethod
from vllm_ext.kv_managers.view import KVView
from vllm_ext.options import ConfigError
from vllm_ext.training.model import Frozen, watched

ORACLE = "oracle"
"""Keeps what the forced tokens really attend to: the bound of any choice by attention."""


@dataclass(frozen=True)
class Candidate:
    """One row: a label, and a method or None for the oracle."""

    label: str
    method: KVMethod | None
    ratio: float


@dataclass
class Layer:
    """What one layer of one text sees: queries [T, Hq, D], keys and values [H, T, D], output slices [Hq, D, hidden]."""

    number: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    weight: Tensor
    scale: float
    side: Tensor | None

    def outputs(self, prompt: int, kept: Tensor | None) -> Tensor:
        """Attention of the tokens behind the prompt to `kept` [H, B] of it (None = all) and each other: [m, hidden]."""
        heads, total, _ = self.keys.shape
        m = total - prompt
        index = torch.arange(prompt, device=self.keys.device).expand(heads, -1) if kept is None else kept
        index = torch.cat([index, torch.arange(prompt, total, device=index.device).expand(heads, m)], 1)
        at = index[..., None].expand(-1, -1, self.keys.shape[-1])
        k, v = self.keys.gather(1, at).float(), self.values.gather(1, at).float()
        q = self.queries[prompt:].float().transpose(0, 1).unflatten(0, (heads, -1))  # [H, G, m, D]
        logits = q @ k[:, None].transpose(-1, -2) * self.scale
        hidden = index[:, None, :] > torch.arange(prompt, total, device=index.device)[:, None]
        p = logits.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
        out = (p @ v[:, None]).flatten(0, 1)  # [Hq, m, D]
        return torch.einsum("hmd,hde->me", out, self.weight.float())


def keep(method: KVMethod, layer: Layer, prompt: int, share: float) -> Tensor:
    """Tokens of the prompt that the method keeps in this layer, as the engine would: [H, B] ascending."""
    heads = layer.keys.shape[0]
    counts = Counts(method, share)
    held = torch.arange(0, device=layer.keys.device).expand(heads, 0)
    events = [prompt]
    if method.trigger == "streaming":
        events = list(range(method.stride, prompt + 1, method.stride))
    state: dict[str, Any] = {}
    for seen in events:
        last = int(held[0, -1]) + 1 if held.numel() else 0
        held = torch.cat([held, torch.arange(last, seen, device=held.device).expand(heads, -1)], 1)
        n, budget = held.shape[1], counts.kept(prompt)
        if n <= budget:
            continue
        view = _view(method, layer, held, seen, prompt, budget, state)
        scores = method.score(view).float()
        scores = scores if method.scope == "head" else scores.mean(1, keepdim=True).expand_as(scores)
        held = held.gather(1, reference.choose(scores[0], budget, n, method.sinks, n - method.window))
    fresh = torch.arange(int(held[0, -1]) + 1, prompt, device=held.device).expand(heads, -1)
    return torch.cat([held, fresh], 1)


def _view(
    method: KVMethod, layer: Layer, held: Tensor, seen: int, prompt: int, budget: int, state: dict[str, Any]
) -> KVView:
    at = held[..., None].expand(-1, -1, layer.keys.shape[-1])
    side = None if layer.side is None else layer.side.gather(1, held)[None, ..., None]
    queries = layer.queries[max(0, seen - method.window) : seen]
    view = KVView.from_tensors(
        layer.keys.gather(1, at)[None], layer.values.gather(1, at)[None], queries[None],
        scale=layer.scale, budget=budget, prompt=prompt, seen=seen, positions=held[None], side=side,
        output_weights=[layer.weight], layers=[layer.number],
    )  # fmt: skip
    view.state = state
    return view


def oracle(layer: Layer, prompt: int, budget: int, sinks: int, window: int) -> Tensor:
    """[H, budget]: the tokens with the largest attention of all tokens behind the prompt, each head for itself."""
    m = layer.queries.shape[0] - prompt
    future = reference.window_attention(layer.queries[-m:][None], layer.keys[None], layer.scale)
    worth = reference.group_mean(reference.weighted_rows(future), layer.keys.shape[0])[0, :, :prompt]
    return reference.choose(worth, budget, prompt, sinks, prompt - window)


Advance = Callable[[str, int, int], None]


@torch.no_grad()
def measure(
    model: Frozen, candidates: Sequence[Candidate], texts: Sequence[Sequence[int]], prompt: int, advance: Advance
) -> list[dict[str, Any]]:
    """Errors of every candidate; one JSON-ready row each, with a bootstrap interval over the texts.

    Args:
        texts: token ids; each at least one longer than `prompt`.
        prompt: tokens that are compressed, a multiple of every method's block size.
    """
    errors: list[list[Tensor]] = [[] for _ in candidates]
    for number, ids in enumerate(texts):
        advance("texts", number, len(texts))
        for found, error in zip(errors, _text(model, candidates, ids, prompt)):
            found.append(error)
    advance("texts", len(texts), len(texts))
    return [_row(c, e, prompt) for c, e in zip(candidates, errors)]


def _text(model: Frozen, candidates: Sequence[Candidate], ids: Sequence[int], prompt: int) -> list[Tensor]:
    """Of each candidate, errors [layers, m] on one text."""
    found: list[list[Tensor]] = [[] for _ in candidates]
    sides = _Sides(model, [c.method for c in candidates])

    def watch(number: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        for place, c in enumerate(candidates):
            layer = Layer(
                number, q[0].transpose(0, 1), k[0], v[0], output_weight(model, number), scale, sides.of(place, number)
            )
            full = layer.outputs(prompt, None)
            error = (layer.outputs(prompt, _kept(c, layer, prompt, model)) - full).norm(dim=-1) / full.norm(dim=-1)
            found[place].append(error.cpu())

    with sides, watched(watch):
        model.body(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    return [torch.stack(layers) for layers in found]


def _kept(c: Candidate, layer: Layer, prompt: int, model: Frozen) -> Tensor:
    if c.method is None:
        like = KVMethod(ratio=c.ratio)
        return oracle(layer, prompt, Counts(like).kept(prompt), like.sinks, like.window)
    return keep(c.method, layer, prompt, c.method.layer_shares(model.shape.layers)[layer.number])


def output_weight(model: Frozen, layer: int) -> Tensor:
    """[Hq, D, hidden] slices of a layer's output projection."""
    weight = model.body.layers[layer].self_attn.o_proj.weight
    return weight.t().reshape(model.shape.heads, model.shape.head_size, -1)


class _Sides:
    """Log retentions [H, T] of the methods with gates, from the inputs of the attention blocks."""

    def __init__(self, model: Frozen, methods: Sequence[KVMethod | None]) -> None:
        self.model, self.hooks, self.values = model, [], {}  # type: ignore[var-annotated]
        config = model.body.config.get_text_config()
        self.gates = {
            i: m.load_gates(config) for i, m in enumerate(methods) if m is not None and hasattr(m, "load_gates")
        }

    def of(self, place: int, layer: int) -> Tensor | None:
        return self.values.get((place, layer))

    def _gate(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from vllm_ext.kernels.kv_score_trim import log_retention

        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        for place, gates in self.gates.items():
            w1, b1, w2, b = (w.to(x.device, torch.float32) for w in gates.layer(module.layer_idx))
            self.values[place, module.layer_idx] = log_retention(x[0], w1, b1, w2, b, gates.activation).T

    def __enter__(self) -> None:
        if self.gates:
            layers = self.model.body.layers
            self.hooks = [x.self_attn.register_forward_pre_hook(self._gate, with_kwargs=True) for x in layers]

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()


def _row(c: Candidate, errors: list[Tensor], prompt: int) -> dict[str, Any]:
    every = torch.stack(errors)
    low, high = stats.bootstrap_mean([e.flatten().numpy() for e in errors])
    kept = Counts(c.method or KVMethod(ratio=c.ratio)).kept(prompt)
    return {
        "label": c.label, "ratio": c.ratio, "kept": kept, "prompt": prompt, "texts": len(errors),
        "positions": every.shape[-1], "mean": float(every.mean()), "low": low, "high": high,
        "p95": float(every.flatten().double().quantile(0.95)) if every.numel() < 16_000_000 else None,
        "by_layer": [round(float(x), 4) for x in every.mean((0, 2))],
    }  # fmt: skip


def check_prompt(methods: Sequence[KVMethod], prompt: int) -> None:
    """Raise ConfigError unless `prompt` is a whole number of every method's blocks and scores fit this measurement."""
    for m in methods:
        if prompt % m.block_size:
            raise ConfigError(
                f"--length must be a multiple of {m.plugin_name()}.block_size ({m.block_size}), got {prompt}."
            )
        if m.scope == "model":
            raise ConfigError(f"{m.plugin_name()}.scope model needs all layers at once; use scope head or layer here.")
