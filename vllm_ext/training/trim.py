"""Train TRIM-KV's retention gates: distillation from full attention, and a capacity loss (Bui et al., ICLR 2026).

The paper's losses with weights 1: KL(full || gated), next-token likelihood, capacity. The gated model adds
`(t - i) log beta_i` to its logits, so a token fades as it would be evicted.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from vllm_ext.evaluation import corpus
from vllm_ext.options import ConfigError
from vllm_ext.training import loop, text
from vllm_ext.training.gated import GatedModel, Gates, output_embedding
from vllm_ext.training.model import Frozen

LOSS_SCALE = 1e6
"""A gate near "forget nothing" has gradients of about 1e-8: scaled far above AdamW's epsilon, which else decides."""
ROWS = 1024
"""Rows of logits that exist at once."""


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run.

    Attributes:
        steps, batch, window: batches of `batch` windows of `window` tokens.
        passkeys: windows of a batch that hide passkeys and ask for them; the others are plain text.
        memory: tokens a KV head may hold before the capacity loss acts (the paper: 256).
        inner: inner size of a gate (the paper: 512 at hidden size 2560).
        bias: first bias of a gate (the paper: 18). The gate is flat there; a short training starts lower.
        lr, warmup: peak of the learning rate, after so many steps; then a cosine to a tenth (the paper does not say).
        capacity: weight of the capacity loss (the paper: 1).
        seed: of the first weights and of the windows.
    """

    steps: int = 800
    batch: int = 4
    window: int = 2048
    passkeys: int = 1
    memory: int = 256
    inner: int = 128
    bias: float = 8.0
    lr: float = 1e-3
    warmup: int = 20
    capacity: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError for values that cannot be trained with."""
        if min(self.steps, self.batch, self.memory, self.inner) < 1:
            raise ConfigError("--steps, --batch, --memory and --inner must be at least 1.")
        if not 0 <= self.passkeys <= self.batch:
            raise ConfigError(f"--passkeys must be between 0 and --batch ({self.batch}), got {self.passkeys}.")
        if self.window <= self.memory:
            raise ConfigError(f"--window must exceed --memory ({self.memory}), got {self.window}.")


def batch_ids(model: Frozen, tokens: Tensor, s: Settings, step: int) -> Tensor:
    """Token ids of one step and the token after each window: [batch, window + 1], the last rows with passkeys."""
    gen = loop.generator(s.seed, step)
    length = s.window + 1
    ids = text.windows(tokens, s.batch, length, gen, corpus.leading_special(model.tokenizer))
    for i in range(s.passkeys):
        ids[s.batch - 1 - i] = torch.tensor(
            text.passkeys(
                model.tokenizer, tokens, length=length, labels=s.window // 8, seed=s.seed, step=step * s.batch + i,
                keys=max(1, min(10, s.window // 200)),
            )
        )  # fmt: skip
    return ids


def token_losses(hidden: Tensor, teacher: Tensor, targets: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Mean KL(teacher || student) and mean negative log-likelihood, both in nats a token.

    Args:
        hidden, teacher: [N, D] last hidden states.
        targets: [N] next tokens.
        head: [V, D] output embedding.

    The logits [N, V] are made a few rows at a time, and again in the backward pass.
    """
    kl = nll = torch.zeros((), device=hidden.device)
    part = functools.partial(recompute, _token_sums, use_reentrant=False)
    for first in range(0, hidden.shape[0], ROWS):
        cut = slice(first, first + ROWS)
        more = part(hidden[cut], teacher[cut], targets[cut], head)
        kl, nll = kl + more[0], nll + more[1]
    return kl / hidden.shape[0], nll / hidden.shape[0]


def _token_sums(hidden: Tensor, teacher: Tensor, targets: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    ours = torch.log_softmax((hidden @ head.T).float(), -1)
    theirs = torch.log_softmax((teacher @ head.T).float(), -1)
    return (theirs.exp() * (theirs - ours)).sum(), torch.nn.functional.nll_loss(ours, targets, reduction="sum")


def losses(gated: GatedModel, head: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """`kl` and `nll` in nats a token, and `capacity`, of windows with their next tokens [B, T + 1]."""
    ids = ids.to(gated.model.device)
    teacher = gated.teacher(ids[:, :-1]).flatten(0, 1)
    hidden, capacity = gated.student(ids[:, :-1])
    kl, nll = token_losses(hidden.flatten(0, 1), teacher, ids[:, 1:].flatten(), head)
    return {"kl": kl, "nll": nll, "capacity": capacity}


@torch.no_grad()
def evaluate(gated: GatedModel, head: Tensor, windows: list[list[int]]) -> dict[str, float]:
    """Mean losses on held-out windows."""
    found = [losses(gated, head, torch.tensor([w])) for w in windows]
    return {k: sum(float(f[k]) for f in found) / len(found) for k in found[0]}


def train(
    model: Frozen, texts: list[str], out: Path, settings: Settings, *, checkpoint: Path, stop_after: int | None = None,
    windows: int = 4,
) -> dict[str, Any]:  # fmt: skip
    """Train the gates, write them to `out`, and return the training record's results (JSON types).

    Raises:
        ConfigError: settings, text or checkpoint do not fit.
        RuntimeError: a loss is not finite.
    """
    settings.check()
    config = model.body.config.get_text_config()
    tokens, head = text.encode(model.tokenizer, texts), output_embedding(model)
    gates = Gates.of(config, settings.inner, settings.bias, settings.seed).to(model.device)
    gated = GatedModel(model, gates, settings.memory)
    held_out = corpus.windows(model.tokenizer, windows, settings.window + 1) if windows else []
    before = evaluate(gated, head, held_out) if held_out else {}

    def step(number: int) -> dict[str, Tensor]:
        found = losses(gated, head, batch_ids(model, tokens, settings, number))
        ((found["kl"] + found["nll"] + settings.capacity * found["capacity"]) * LOSS_SCALE).backward()
        return {k: v.detach() for k, v in found.items()}

    run = loop.Run(
        dict(gates.named_parameters()), step,
        loop.cosine(settings.steps, settings.lr, settings.lr / 10, settings.warmup), settings.steps,
        {**asdict(settings), "model": model.shape.to_json(), "tokens": tokens.numel()}, checkpoint, label="train trim",
    )  # fmt: skip
    run.fit(stop_after)
    judged = {"before": before}
    results = {"settings": run.settings, "seconds": run.seconds, "history": run.history, "held_out": judged}
    if stop_after is not None and stop_after < settings.steps:
        return results
    judged["after"] = evaluate(gated, head, held_out) if held_out else {}
    gates.export(config, settings.memory).save(out)
    checkpoint.unlink(missing_ok=True)
    return results
