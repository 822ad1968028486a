"""Merge the experts of an MoE model into fewer, without training: NAMEx, CAMEx and the plain baselines.

NAMEx (arXiv 2510.16138) bargains a step from a base expert, CAMEx adds weighted differences to it. Both are trained in
their papers; here they work on a finished model, cluster by cluster, in every layer alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vllm_ext.moe import trace_file
from vllm_ext.moe.checkpoint import Checkpoint, Experts, Writer, expert_tensors
from vllm_ext.moe.nash import NoBargain, nash_weights
from vllm_ext.options import ConfigError, did_you_mean

METHODS = ("nash", "camex", "mean", "drop")
PROBES = 256
"""Probe inputs of a layer whose outputs decide which experts are alike."""


@dataclass(frozen=True)
class Plan:
    """How to merge.

    Attributes:
        experts: experts of the merged model.
        method: "nash": base + step along the Nash point; "camex": base + step * sum of s_i tau_i, s_i the expert's
            share of its cluster's use (identity curvature); "mean": mean of the cluster; "drop": the most used alone.
        step: nash: 1 goes as far from the base as the mean would among experts that differ in orthogonal directions;
            camex: 1 is the mean weighted by use.
        align: permute the neurons of each expert to match its base's first.
        seed: of the probe inputs.
    """

    experts: int
    method: str = "nash"
    step: float = 1.0
    align: bool = True
    seed: int = 0

    def check(self, source: Checkpoint) -> None:
        """Raise ConfigError for an unknown method or an expert count that this model cannot have."""
        if self.method not in METHODS:
            raise ConfigError(f"--method '{self.method}' is unknown{did_you_mean(self.method, METHODS)}")
        low, high = source.top_k, source.num_experts - 1
        if not low <= self.experts <= high:
            raise ConfigError(
                f"--experts must be between {low} (the experts a token uses) and {high} for "
                f"{source.folder.name}, which has {source.num_experts}; got {self.experts}."
            )
        if not 0 < self.step < float("inf"):
            raise ConfigError(f"--step must be above 0, got {self.step}.")


@dataclass
class Summary:
    """What was done."""

    source: str
    before: int
    after: int
    layers: int
    method: str
    clusters: int = 0
    fallbacks: int = 0
    sizes: list[int] = field(default_factory=list)

    def text(self) -> str:
        """One or two sentences."""
        text = f"{self.source}: {self.before} -> {self.after} experts in {self.layers} layers by {self.method}"
        if self.fallbacks:
            text += f"; {self.fallbacks} of {self.clusters} clusters had no bargaining solution and took their mean"
        return f"{text}; largest cluster {max(self.sizes, default=1)}."


def merge_checkpoint(
    model: Path,
    out: Path,
    plan: Plan,
    trace: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: torch.device | str = "cpu",
) -> Summary:
    """Write the merged model to `out`, layer by layer.

    Args:
        model: MoE model directory.
        out: directory to make.
        plan: how to merge.
        trace: trace of this model; without it all experts count as used alike.
        progress: told layers done and in all.
        device: where to compare and to match; holds one layer and a few experts in fp32.

    Raises:
        ConfigError: not an MoE model of a known layout, an impossible plan, or a trace of another model.
    """
    source = Checkpoint(model)
    plan.check(source)
    use = usage(source, trace)
    writer = Writer(out, model)
    summary = Summary(model.name, source.num_experts, plan.experts, len(source.layers), plan.method)
    for _, tensors in source.others():
        writer.add(tensors)
    for number, layer in enumerate(source.layers):
        progress(number, len(source.layers))
        norm = source.tensor(f"model.layers.{layer}.post_attention_layernorm.weight").float()
        probes = torch.randn(PROBES, len(norm), generator=torch.Generator().manual_seed(plan.seed)) * norm
        merged = merge_layer(source.experts(layer).to(device), use[layer], plan, probes.to(device), summary)
        writer.add(expert_tensors(source.layout, layer, merged.to("cpu")))
    progress(len(source.layers), len(source.layers))
    writer.close(source.config | {source.layout.count: plan.experts})
    return summary


def usage(source: Checkpoint, trace: Path | None) -> dict[int, torch.Tensor]:
    """Layer -> share of the pairs of each expert [E]; uniform without a trace."""
    count = source.num_experts
    if trace is None:
        return {layer: torch.full((count,), 1 / count, dtype=torch.float64) for layer in source.layers}
    found = trace_file.load(trace)
    trace_file.check_model(found, trace, count, source.top_k, source.layers, source.folder.name)
    ids = torch.from_numpy(found.experts.astype("int64"))
    shares = {}
    for i, layer in enumerate(source.layers):
        used = ids[:, i][(ids[:, i] >= 0) & (ids[:, i] < count)]
        shares[layer] = torch.bincount(used, minlength=count).double() / max(used.numel(), 1)
    return shares


def merge_layer(experts: Experts, use: torch.Tensor, plan: Plan, probes: torch.Tensor, summary: Summary) -> Experts:
    """One layer's merged experts; a cluster's gate row is the mean of its members' rows, or its base's under "drop"."""
    if plan.method == "drop":
        kept = use.argsort(descending=True, stable=True)[: plan.experts].sort().values.to(experts.gate.device)
        return Experts(experts.router[kept], experts.gate[kept], experts.up[kept], experts.down[kept])
    clusters = cluster(output_similarity(experts, probes).cpu(), plan.experts)
    summary.clusters += len(clusters)
    summary.sizes += [len(c) for c in clusters]
    stacks: list[list[torch.Tensor]] = [[], [], []]
    for members in clusters:
        for stack, weight in zip(stacks, merge_cluster(experts, members, use, plan, summary)):
            stack.append(weight.to(experts.gate.dtype))
    rows = torch.stack([experts.router[c].float().mean(0) for c in clusters])
    return Experts(rows.to(experts.router.dtype), *(torch.stack(s) for s in stacks))


def merge_cluster(
    experts: Experts, members: list[int], use: torch.Tensor, plan: Plan, summary: Summary
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate, up and down of one merged expert, fp32. The base is the most used member, the lowest among equals."""
    base = max(members, key=lambda e: (float(use[e]), -e))
    centre = flat(experts, base)
    orders = {e: matching(experts, base, e) if plan.align else None for e in members if e != base}
    wishes = {e: flat(experts, e, order) - centre for e, order in orders.items()}
    wishes = {e: tau for e, tau in wishes.items() if bool(tau.any())}  # an expert equal to the base asks for nothing
    merged = centre
    if wishes:
        tau = torch.stack(list(wishes.values()))
        if plan.method == "nash":
            merged = centre + _bargain(tau, len(members), plan.step, summary)
        elif plan.method == "camex":
            share = use[list(wishes)] / max(float(use[members].sum()), 1e-12)
            merged = centre + plan.step * share.to(tau) @ tau
        else:
            merged = centre + tau.sum(0) / len(members)
    n, d = experts.gate.shape[1:]
    gate, up, down = merged.split(n * d)
    return gate.view(n, d), up.view(n, d), down.view(n, d).T.contiguous()


def _bargain(wishes: torch.Tensor, members: int, step: float, summary: Summary) -> torch.Tensor:
    """The step from the base; the mean where the wishes cancel out."""
    wide = wishes.double()
    gram = (wide @ wide.T).cpu()
    try:
        alpha = nash_weights(gram)
    except NoBargain:
        summary.fallbacks += 1
        return wishes.sum(0) / members
    length = step * float(gram.diagonal().sqrt().mean()) / (len(wishes) + 1)
    return (length * alpha).to(wishes) @ wishes


def flat(experts: Experts, e: int, order: torch.Tensor | None = None) -> torch.Tensor:
    """Expert `e` as one vector of 3nd numbers, fp32, its neurons in `order`."""
    parts = (experts.gate[e].float(), experts.up[e].float(), experts.down[e].float().T)
    return torch.cat([(p if order is None else p[order]).reshape(-1) for p in parts])


def matching(experts: Experts, base: int, e: int) -> torch.Tensor | None:
    """Order of the neurons of `e` that is like those of `base`, None for the order they have.

    Pairs that are each other's best are matched and taken out, until none is left: the same as taking the largest inner
    product again and again, which is at least half of the best assignment.
    """

    def neurons(i: int) -> torch.Tensor:
        return torch.cat([experts.gate[i].float(), experts.up[i].float(), experts.down[i].float().T], dim=1)

    like = neurons(base) @ neurons(e).T
    rows = torch.arange(len(like), device=like.device)
    order = torch.full_like(rows, -1)
    while bool((order < 0).any()):
        best = like.argmax(1)
        mutual = (like.argmax(0)[best] == rows) & (order < 0)
        order[mutual] = best[mutual]
        like[mutual] = float("-inf")
        like[:, best[mutual]] = float("-inf")
    return None if bool((order == rows).all()) else order


def output_similarity(experts: Experts, probes: torch.Tensor) -> torch.Tensor:
    """[E, E] cosine of the experts' outputs on probe inputs [P, d], over all probes at once."""
    outputs = []
    for gate, up, down in zip(experts.gate, experts.up, experts.down):
        hidden = torch.nn.functional.silu(probes @ gate.float().T) * (probes @ up.float().T)
        outputs.append((hidden @ down.float().T).reshape(-1))
    unit = torch.nn.functional.normalize(torch.stack(outputs), dim=1)
    return unit @ unit.T


def cluster(similarity: torch.Tensor, count: int) -> list[list[int]]:
    """Agglomerative clustering with average linkage into `count` clusters, in the order of their lowest member."""
    groups = [[e] for e in range(len(similarity))]
    link = similarity.double().clone()
    link.fill_diagonal_(float("-inf"))
    while len(groups) > count:
        i, j = sorted(divmod(int(link.argmax()), len(link)))
        a, b = len(groups[i]), len(groups[j])
        joined = (a * link[i] + b * link[j]) / (a + b)
        link[i], link[:, i] = joined, joined
        link[i, i] = float("-inf")
        groups[i] += groups[j]
        del groups[j]
        keep = [k for k in range(len(link)) if k != j]
        link = link[keep][:, keep]
    return [sorted(g) for g in groups]
