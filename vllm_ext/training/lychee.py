"""Head identification of LycheeDecode: which KV heads must read every key, so that the others can inherit their pages.

A prompt hides passkeys; its last tokens ask for them. Those label tokens are decoded twice over the context's dense
keys: densely, and with each KV head's attention weights blended, z * dense + (1 - z) * (its inherited pages only). z is
HardKuma, one (alpha, beta) a layer and head. Loss: mean square difference of the final hidden states, plus a Lagrangian
that brings P(z != 0) down to the target density (paper, sections 3.3 and 4.1).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_ext.attention_backends import role_file
from vllm_ext.evaluation import corpus
from vllm_ext.options import ConfigError
from vllm_ext.training import hard_kuma, loop, text
from vllm_ext.training.model import Frozen, watched

SINK_TOKENS, RECENT_TOKENS = 128, 256
"""Always in a set (published code)."""


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run.

    Attributes:
        window: longest prompt; each step draws a length from a quarter of it to all of it.
        labels: tokens of questions and answers at its end.
        keep: share of the pages that a sparse head inherits (published: 0.3 of the tokens).
        page_size: tokens a page; 1 gives the published token sets.
        density: target of P(z != 0) over the heads behind the first layer.
        anneal: share of the steps over which the target falls from 1 to `density`; 0 in the paper.
        penalty, penalty_lr: the Lagrange multiplier's start and rate.
    """

    steps: int = 1000
    batch: int = 4
    window: int = 4096
    labels: int = 192
    page_size: int = 64
    keep: float = 0.3
    density: float = 0.0833
    anneal: float = 0.0
    lr: float = 0.01
    penalty: float = 2.0
    penalty_lr: float = 0.001
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError for values that cannot be trained with."""
        for name, low in (("keep", 0.0), ("density", 0.0), ("anneal", -1e-9)):
            if not low < getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be between 0 and 1, got {getattr(self, name)}.")
        if min(self.steps, self.batch, self.labels, self.page_size) < 1:
            raise ConfigError("--steps, --batch, --labels and --page-size must be at least 1.")
        if self.window < 4 * self.labels:
            raise ConfigError(f"--window {self.window} must be at least four times --labels {self.labels}.")

    def target(self, step: int) -> float:
        """Density that a step aims at."""
        if not self.anneal:
            return self.density
        return max(self.density, 1 - (1 - self.density) * step / (self.anneal * self.steps))


class Blend:
    """The watcher of the second pass: attention weights of dense and inherited sets, mixed by z [B, layers, H].

    Sets flow as in serving: a head whose z exceeds 1/2 hands on its own pages, another head the ones it was given.
    """

    def __init__(self, context: list[tuple[Tensor, Tensor]], z: Tensor, settings: Settings) -> None:
        self.context, self.z, self.settings = context, z, settings
        self.member: Tensor | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = (torch.cat([a, b], 2) for a, b in zip(self.context[layer], (k, v)))
        (_, h, n, _), m = k.shape, q.shape[2]
        x = q.float().unflatten(1, (h, -1)).flatten(2, 3) @ k.float().transpose(-1, -2)
        x = x.unflatten(2, (-1, m)) * scale
        seen = torch.arange(n, device=q.device) <= torch.arange(n - m, n, device=q.device)[:, None]
        weight = x.masked_fill(~seen, -math.inf).softmax(-1)
        z = self.z[:, layer, :, None, None, None].float()
        if self.member is not None:
            kept = (self.member.repeat_interleave(self.settings.page_size, -1)[..., :n] & seen)[:, :, None]
            weight = z * weight + (1 - z) * x.masked_fill(~kept, -math.inf).softmax(-1)
        self._carry(x.detach(), seen, z[:, :, :, 0] > 0.5)
        return (weight.to(v.dtype).flatten(2, 3) @ v).unflatten(2, (-1, m)).flatten(1, 2)

    def _carry(self, x: Tensor, seen: Tensor, refresh: Tensor) -> None:
        """Pages for the next layer [B, H, m, N]: those with the largest logit of the group's mean query."""
        page, n, m = self.settings.page_size, x.shape[-1], x.shape[-2]
        count = -(-n // page)
        score = x.mean(2).masked_fill(~seen, -math.inf)
        score = torch.nn.functional.pad(score, (0, count * page - n), value=-math.inf)
        score = score.unflatten(-1, (count, page)).amax(-1)
        at = torch.arange(count, device=x.device)
        last = torch.arange(n - m, n, device=x.device)[:, None]
        recent = (at >= (last - RECENT_TOKENS + 1).clamp(min=0) // page) & (at <= last // page)
        score = score.masked_fill(recent | (at < SINK_TOKENS // page), math.inf)
        kept = max(1, round(self.settings.keep * count))
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(kept, -1).indices, True)
        self.member = chosen if self.member is None else torch.where(refresh, chosen, self.member)


def prompts(model: Frozen, tokens: Tensor, s: Settings, step: int) -> Tensor:
    """Token ids [batch, length] of one step; the last `labels` are decoded twice."""
    gen = loop.generator(s.seed, step)
    low = max(s.window // 4, text.shortest(model.tokenizer, s.labels))
    length = low if low >= s.window else int(torch.randint(low, s.window + 1, (), generator=gen))
    rows = [
        text.passkeys(model.tokenizer, tokens, length, s.labels, s.seed, step * s.batch + i) for i in range(s.batch)
    ]
    return torch.tensor(rows)


def context_and_target(model: Frozen, ids: Tensor, labels: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Dense pass: keys and values of the context by layer, and the label tokens' final hidden states [B, labels, C]."""
    kept: list[tuple[Tensor, Tensor]] = []
    split = ids.shape[1] - labels

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        kept.append((k[:, :, :split], v[:, :, :split]))

    with torch.no_grad(), watched(watch):
        hidden = model.body(input_ids=ids, use_cache=False).last_hidden_state[:, split:]
    return kept, hidden


def blended(model: Frozen, ids: Tensor, context: list[tuple[Tensor, Tensor]], z: Tensor, s: Settings) -> Tensor:
    """The label tokens' final hidden states [B, labels, C] under z [B, layers, H]."""
    n = ids.shape[1]
    at = torch.arange(n - s.labels, n, device=ids.device)[None]
    with watched(Blend(context, z, s)):
        return model.body(input_ids=ids[:, -s.labels :], position_ids=at, use_cache=False).last_hidden_state


class Roles:
    """alpha, beta [layers, H], the Lagrange multiplier, and a training step."""

    def __init__(self, model: Frozen, tokens: Tensor, settings: Settings) -> None:
        self.model, self.tokens, self.settings = model, tokens, settings
        size = (model.shape.layers, model.shape.kv_heads)
        self.alpha = torch.ones(size, device=model.device, requires_grad=True)
        self.beta = torch.ones(size, device=model.device, requires_grad=True)
        self.penalty = torch.tensor([settings.penalty])
        self.excess = torch.zeros(1)

    def step(self, step: int) -> dict[str, Tensor | float]:
        """One step of the paper's algorithm: gradients of distillation and sparsity."""
        s, device = self.settings, self.model.device
        ids = prompts(self.model, self.tokens, s, step).to(device)
        context, target = context_and_target(self.model, ids, s.labels)
        u = torch.rand((s.batch, *self.alpha.shape), generator=loop.generator(s.seed + 1, step)).to(device)
        z = hard_kuma.sample(self.alpha, self.beta, u)
        z = torch.cat([torch.ones_like(z[:, :1]), z[:, 1:]], 1)  # the first layer initialises the sets
        found = blended(self.model, ids, context, z, s)
        distill = (found.float() - target.float()).pow(2).mean()
        density = hard_kuma.nonzero(self.alpha, self.beta)[1:].mean()
        excess = torch.relu(density - s.target(step))
        self.excess.mul_(0.9).add_(0.1 * excess.detach().cpu())
        smooth = excess + (self.excess.to(device)[0] - excess.detach())
        self.penalty.mul_(torch.exp(s.penalty_lr * self.excess)).clamp_(1e-12, 20.0)
        (distill + self.penalty.to(device)[0] * smooth).backward()
        return {"distill": distill, "density": density, "penalty": self.penalty[0]}

    def scores(self) -> Tensor:
        """Mean of each head's base variable [layers, H]; the first layer's are 1."""
        mean = hard_kuma.mean(self.alpha.detach(), self.beta.detach())
        mean[0] = 1.0
        return mean.cpu()


def hidden_error(model: Frozen, ids: list[Tensor], roles: Tensor, s: Settings) -> float:
    """Relative square error of the final hidden states with hard roles [layers, H], mean over prompts [B, n]."""
    total = 0.0
    with torch.no_grad():
        for batch in ids:
            context, target = context_and_target(model, batch, s.labels)
            z = roles.float().to(model.device).expand(batch.shape[0], -1, -1)
            found = blended(model, batch, context, z, s)
            total += ((found - target).float().pow(2).mean() / target.float().pow(2).mean()).item()
    return total / len(ids)


def evaluate(model: Frozen, roles: Tensor, s: Settings, batches: int) -> dict[str, float]:
    """`hidden_error` on held-out prompts: these roles, as many random ones (mean of 4), and the first layer alone."""
    held_out = torch.tensor(corpus.tokens(model.tokenizer, corpus.HELD_OUT), dtype=torch.int32)
    fixed = Settings(**{**asdict(s), "seed": s.seed + 7})
    ids = [prompts(model, held_out, fixed, i).to(model.device) for i in range(batches)]
    count = int(roles[1:].sum())
    gen = loop.generator(s.seed, -2)
    alone = torch.zeros_like(roles)
    alone[0] = True
    found = {"trained": hidden_error(model, ids, roles, s), "first_layer_only": hidden_error(model, ids, alone, s)}
    errors = []
    for _ in range(4):
        mixed = alone.clone().flatten()
        mixed[roles.shape[1] + torch.randperm(mixed.numel() - roles.shape[1], generator=gen)[:count]] = True
        errors.append(hidden_error(model, ids, mixed.view_as(roles), s))
    return found | {"random": sum(errors) / len(errors)}


def train(
    model: Frozen, texts: list[str], out: Path, settings: Settings, *, checkpoint: Path, stop_after: int | None = None,
    batches: int = 4,
) -> dict[str, Any]:  # fmt: skip
    """Train the roles, write them to `out`, and return the training record's results (JSON types).

    Raises:
        ConfigError: settings, text or checkpoint do not fit.
    """
    settings.check()
    tokens = text.encode(model.tokenizer, texts)
    roles = Roles(model, tokens, settings)
    run = loop.Run(
        {"alpha": roles.alpha, "beta": roles.beta},
        roles.step,
        loop.trapezoid(settings.steps, settings.lr),
        settings.steps,
        {**asdict(settings), "model": model.shape.to_json(), "tokens": tokens.numel()},
        checkpoint,
        label="train lychee",
        state={"penalty": roles.penalty, "excess": roles.excess},
    )
    run.fit(stop_after)
    results = {"settings": run.settings, "seconds": run.seconds, "history": run.history}
    if stop_after is not None and stop_after < settings.steps:
        return results
    scores = roles.scores()
    chosen = scores > 0.5
    results["retrieval_heads"] = int(chosen.sum())
    results["held_out"] = evaluate(model, chosen, settings, batches) if batches else {}
    notes = {"trained_on": model.name, "steps": settings.steps, "page_size": settings.page_size}
    role_file.write(out, chosen.tolist(), scores.tolist(), model.shape, **notes)
    checkpoint.unlink(missing_ok=True)
    return results
