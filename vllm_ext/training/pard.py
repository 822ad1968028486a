"""PARD: adapt a small model so that mask tokens predict the tokens after the next (An et al., ICLR 2026, section 3).

Subtask k predicts token t + k from the real tokens up to t and k - 1 mask tokens. All subtasks of a window are packed
into one sequence: the real tokens, then for k = 2 .. K the masks of the anchors t that subtask k keeps. Conditional
drop keeps a falling share of anchors, each a subset of the one before: a kept mask always finds those before it.
Labels are the teacher's distributions on the same window: a draft is good if the target agrees with it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_ext.options import ConfigError
from vllm_ext.training import text
from vllm_ext.training.loop import Metrics, Run, cosine, generator


@dataclass(frozen=True)
class Settings:
    """What decides the result.

    Attributes:
        layers: layers of the draft model, spread evenly over those of the given one; 0 = all of them.
        drafts: K, subtasks.
        keep, keep_least: share of anchors that each subtask keeps of the one before, and at least of all (paper: 0.7
            and 0.2).
        mask_token: token id that stands for an unknown token; -1 = the last of the vocabulary.
        steps, batch, window: training steps, windows of a step, tokens of a window.
        lr, seed: highest learning rate; seed of windows and anchors.
    """

    layers: int = 0
    drafts: int = 8
    keep: float = 0.7
    keep_least: float = 0.2
    mask_token: int = -1
    steps: int = 2000
    batch: int = 8
    window: int = 512
    lr: float = 4e-4
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError, naming the option, for values that train nothing."""
        for name, low in (("drafts", 2), ("steps", 1), ("batch", 1), ("window", 32), ("layers", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"--{name} must be at least {low}, got {getattr(self, name)}.")
        if not 0 < self.keep_least <= self.keep <= 1:
            raise ConfigError("--keep and --keep-least must be in (0, 1], the second not above the first.")


def anchors(window: int, settings: Settings, gen: torch.Generator) -> list[Tensor]:
    """Ascending anchor positions of subtasks 1 .. K in a window; each a subset of the one before."""
    kept = [torch.arange(window)]
    for k in range(1, settings.drafts):
        count = max(1, int(window * max(settings.keep**k, settings.keep_least)))
        before = kept[-1]
        picked = torch.randperm(len(before), generator=gen)[: min(count, len(before))]
        kept.append(before[picked].sort().values)
    return kept


@dataclass(frozen=True)
class Packed:
    """A packed sequence of N tokens: `anchor` [N] and `subtask` [N] of each (real tokens: themselves and 1)."""

    anchor: Tensor
    subtask: Tensor

    @classmethod
    def of(cls, kept: list[Tensor]) -> Packed:
        """The packing of the anchors that each subtask keeps."""
        subtask = torch.cat([torch.full_like(a, k + 1) for k, a in enumerate(kept)])
        return cls(torch.cat(kept), subtask)

    @property
    def positions(self) -> Tensor:
        """[N] position ids."""
        return self.anchor + self.subtask - 1

    def mask(self) -> Tensor:
        """[N, N] bool: real tokens up to the anchor, and the masks before it on the same anchor, itself included."""
        real = self.subtask == 1
        prefix = real[None, :] & (self.anchor[None, :] <= self.anchor[:, None])
        chain = ~real[None, :] & (self.anchor[None, :] == self.anchor[:, None])
        return prefix | (chain & (self.subtask[None, :] <= self.subtask[:, None]))


def load_draft(model: Path, layers: int, device: torch.device) -> Any:
    """A trainable float32 model of `layers` layers, spread over those of the directory's model; 0 = all."""
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32, attn_implementation="sdpa")
    total = found.config.num_hidden_layers
    if layers > total:
        raise ConfigError(f"--layers {layers} is more than the {total} layers of {model}.")
    if layers:
        chosen = [round(i * (total - 1) / max(layers - 1, 1)) for i in range(layers)]
        found.model.layers = torch.nn.ModuleList(found.model.layers[i] for i in chosen)
        for i, layer in enumerate(found.model.layers):
            layer.self_attn.layer_idx = i
        found.config.num_hidden_layers = layers
        if getattr(found.config, "layer_types", None):
            found.config.layer_types = [found.config.layer_types[i] for i in chosen]
    return found.to(device).train()


def loss_of(
    draft: Any, teacher: Tensor, tokens: Tensor, packed: Packed, mask_token: int, amp: bool
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy against the teacher over kept subtasks, and the share of equal best tokens by subtask.

    Args:
        teacher: [B, T, V] logits of the target on the window; row t is the law of token t + 1.
        tokens: [B, T] the window.
    """
    length, device = tokens.shape[1], tokens.device
    anchor, subtask = packed.anchor.to(device), packed.subtask.to(device)
    real = subtask == 1
    ids = torch.where(real, tokens[:, anchor], mask_token)
    bias = torch.zeros(1, 1, len(anchor), len(anchor), device=device)
    bias.masked_fill_(~packed.mask().to(device), torch.finfo(torch.float32).min)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        hidden = draft.model(
            input_ids=ids,
            position_ids=packed.positions.to(device)[None].expand(len(tokens), -1),
            attention_mask=bias.to(torch.bfloat16) if amp else bias,
            use_cache=False,
        ).last_hidden_state
        row = anchor + subtask - 1  # the teacher's row that predicts the same token
        known = row < length
        logits = draft.lm_head(hidden[:, known])
    want = teacher[:, row[known]]
    law = want.float().softmax(-1)
    loss = -(law * F.log_softmax(logits.float(), -1)).sum(-1).mean()
    equal = (logits.argmax(-1) == want.argmax(-1)).float().mean(0)
    count = int(subtask.max())
    rates = torch.stack([equal[subtask[known] == k].mean() for k in range(1, count + 1)])
    return loss, rates.detach()


def train(
    model: Path,
    teacher: Path,
    texts: list[str],
    out: Path,
    settings: Settings,
    checkpoint: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Train, write the draft model's directory, return JSON results; an interrupted run goes on where it stopped."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    amp = device.type == "cuda"
    target = AutoModelForCausalLM.from_pretrained(str(teacher), dtype=torch.bfloat16 if amp else torch.float32)
    target = target.to(device).eval().requires_grad_(False)
    draft = load_draft(model, settings.layers, device)
    if target.config.vocab_size != draft.config.vocab_size:
        raise ConfigError(
            f"--teacher has a vocabulary of {target.config.vocab_size} tokens and --model one of "
            f"{draft.config.vocab_size}; use models of one family."
        )
    mask_token = settings.mask_token if settings.mask_token >= 0 else draft.config.vocab_size - 1
    tokens = text.encode(tokenizer, texts)
    held = tokens[-max(settings.window * 4, len(tokens) // 50) :]
    tokens = tokens[: len(tokens) - len(held)]

    def batch(source: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor, Packed]:
        gen = generator(seed, step)
        windows = text.windows(source, settings.batch, settings.window, gen).to(device)
        with torch.no_grad():
            logits = target(input_ids=windows, use_cache=False).logits
        return windows, logits, Packed.of(anchors(settings.window, settings, gen))

    def step(number: int) -> Metrics:
        windows, logits, packed = batch(tokens, settings.seed, number)
        loss, rates = loss_of(draft, logits, windows, packed, mask_token, amp)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        return {"loss": loss.detach(), "first": rates[0], "last": rates[-1]}

    run = Run(
        parameters=dict(draft.named_parameters()), step=step,
        rate=cosine(settings.steps, settings.lr, settings.lr / 20, max(1, settings.steps // 20)), steps=settings.steps,
        settings=asdict(settings), checkpoint=checkpoint, label="pard", every=max(200, settings.steps // 4),
    )  # fmt: skip
    run.fit()
    with torch.no_grad():
        windows, logits, packed = batch(held, settings.seed + 1, 0)
        loss, rates = loss_of(draft, logits, windows, packed, mask_token, amp)
    save(draft, tokenizer, mask_token, out)
    checkpoint.unlink(missing_ok=True)
    return {
        "settings": asdict(settings), "mask_token": mask_token,
        "parameters": sum(p.numel() for p in draft.parameters()),
        "tokens": int(tokens.numel()), "seconds": run.seconds, "history": run.history,
        "held_out_loss": float(loss), "held_out_agreement": [float(r) for r in rates],
    }  # fmt: skip


def save(draft: Any, tokenizer: Any, mask_token: int, out: Path) -> None:
    """A model directory in bfloat16 whose config.json names the mask token (`pard_token`)."""
    draft.to(torch.bfloat16).save_pretrained(str(out), safe_serialization=True)
    tokenizer.save_pretrained(str(out))
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pard_token": mask_token}, indent=1) + "\n")
