"""Continued training of an upcycled model: the experts, copies at first, part ways (Komatsuzaki et al., ICLR 2023).

Only experts and routers are trained, on the language-model loss and the load-balancing loss of Switch Transformers
(Fedus et al., JMLR 2022, section 2.2): `E * sum_e f_e p_e`, f_e the share of pairs and p_e the mean router probability
of expert e.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_ext.moe.checkpoint import LAYOUTS, Experts, Writer, expert_tensors
from vllm_ext.moe.models import family_config, llama_config
from vllm_ext.options import ConfigError
from vllm_ext.training import text
from vllm_ext.training.loop import Metrics, Run, cosine, generator


@dataclass(frozen=True)
class Settings:
    """What decides the result.

    Attributes:
        experts, top_k: E and K.
        noise: noise on all experts but the first at the start, in standard deviations of each matrix.
        router: standard deviation of the gate weights at the start.
        balance: weight of the load-balancing loss.
        steps, batch, window: training steps, windows of a step, tokens of a window.
        lr, seed: highest learning rate; seed of the start and the windows.
    """

    experts: int = 8
    top_k: int = 2
    noise: float = 0.05
    router: float = 0.02
    balance: float = 0.01
    steps: int = 500
    batch: int = 16
    window: int = 1024
    lr: float = 3e-4
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError, naming the option, for values that train nothing."""
        for name, low in (("steps", 1), ("batch", 1), ("window", 16), ("experts", 2)):
            if getattr(self, name) < low:
                raise ConfigError(f"--{name} must be at least {low}, got {getattr(self, name)}.")
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"--top-k must be between 1 and --experts ({self.experts}), got {self.top_k}.")


class Block(nn.Module):
    """An MoE block in place of a Llama's MLP; top-k weights sum to 1, as Mixtral's do."""

    def __init__(self, mlp: Any, settings: Settings, gen: torch.Generator) -> None:
        super().__init__()
        self.top_k, count = settings.top_k, settings.experts

        def copies(weight: Tensor) -> nn.Parameter:
            wide = weight.detach().float().cpu()
            noise = torch.randn(count, *wide.shape, generator=gen) * wide.std() * settings.noise
            noise[0] = 0
            return nn.Parameter((wide + noise).to(weight.device))

        self.gate, self.up = copies(mlp.gate_proj.weight), copies(mlp.up_proj.weight)
        self.down = copies(mlp.down_proj.weight)
        start = torch.randn(count, self.gate.shape[2], generator=gen) * settings.router
        self.router = nn.Parameter(start.to(self.gate.device))
        self.balance = torch.zeros(())

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., d]; leaves the load-balancing loss in `balance`."""
        x = hidden.reshape(-1, hidden.shape[-1])
        probabilities = torch.softmax(F.linear(x, self.router).float(), -1)
        top, ids = probabilities.topk(self.top_k, -1)
        top = top / top.sum(-1, keepdim=True)
        pairs = F.one_hot(ids, len(self.router)).sum((0, 1)).float()
        self.balance = len(self.router) * (pairs / pairs.sum() * probabilities.mean(0)).sum()
        out = torch.zeros_like(x)
        for e in range(len(self.router)):
            token, slot = (ids == e).nonzero(as_tuple=True)
            rows = x[token]
            y = F.linear(F.silu(F.linear(rows, self.gate[e])) * F.linear(rows, self.up[e]), self.down[e])
            out = out.index_add(0, token, y.to(out.dtype) * top[token, slot, None].to(out.dtype))
        return out.view(hidden.shape)

    def experts(self, dtype: torch.dtype) -> Experts:
        """What a checkpoint holds."""
        parts = (self.router, self.gate, self.up, self.down)
        return Experts(*(p.detach().to("cpu", dtype) for p in parts))


def upcycled(dense: Path, settings: Settings, device: torch.device) -> tuple[Any, list[Block]]:
    """A Llama whose MLPs are blocks; only these have gradients."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(dense), dtype=torch.float32, attn_implementation="sdpa")
    model = model.to(device).train().requires_grad_(False)
    gen = generator(settings.seed, 0)
    blocks = []
    for layer in model.model.layers:
        layer.mlp = Block(layer.mlp, settings, gen)
        blocks.append(layer.mlp)
    return model, blocks


def losses(model: Any, blocks: list[Block], windows: Tensor, amp: bool) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the next token, and the mean load-balancing loss of the layers (1 = even)."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=amp):
        logits = model(input_ids=windows, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), windows[:, 1:].flatten())
    return loss, torch.stack([b.balance for b in blocks]).mean()


class _Run(Run):
    """Without the checkpoint after the last step: three times the model, and the model is written next."""

    def _save(self, optimizer: torch.optim.Optimizer, done: int) -> None:
        if done < self.steps:
            super()._save(optimizer, done)


def train(
    dense: Path, texts: list[str], out: Path, settings: Settings, checkpoint: Path, device: torch.device,
    tokenizer: Callable[..., Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train, write the Mixtral directory `out`, return JSON results; an interrupted run goes on where it stopped."""
    from transformers import AutoTokenizer

    config = llama_config(dense)
    settings.check()
    writer = Writer(out, dense)
    tokens = text.encode(tokenizer or AutoTokenizer.from_pretrained(str(dense)), texts)
    held = tokens[-max(settings.window * 8, len(tokens) // 50) :]
    tokens = tokens[: len(tokens) - len(held)]
    model, blocks = upcycled(dense, settings, device)
    amp = device.type == "cuda"

    def step(number: int) -> Metrics:
        gen = generator(settings.seed, number + 1)
        windows = text.windows(tokens, settings.batch, settings.window, gen).to(device)
        loss, balance = losses(model, blocks, windows, amp)
        (loss + settings.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_([p for b in blocks for p in b.parameters()], 1.0)
        return {"loss": loss.detach(), "balance": balance.detach()}

    @torch.no_grad()
    def held_out() -> float:
        found = []
        for i in range(8):
            windows = text.windows(held, 1, settings.window, generator(settings.seed + 1, i)).to(device)
            found.append(float(losses(model, blocks, windows, amp)[0]))
        return sum(found) / len(found)

    before = held_out()
    run = _Run(
        parameters={n: p for n, p in model.named_parameters() if p.requires_grad}, step=step,
        rate=cosine(settings.steps, settings.lr, settings.lr / 20, max(1, settings.steps // 20)), steps=settings.steps,
        settings=asdict(settings), checkpoint=checkpoint, label="upcycle", every=500,
    )  # fmt: skip
    run.fit()
    after = held_out()
    save(model, blocks, config, settings, writer)
    checkpoint.unlink(missing_ok=True)
    return {
        "settings": asdict(settings), "tokens": int(tokens.numel()), "seconds": run.seconds, "history": run.history,
        "held_out_loss_before": before, "held_out_loss": after,
    }  # fmt: skip


def save(model: Any, blocks: list[Block], config: dict[str, Any], settings: Settings, writer: Writer) -> None:
    """The model as a Mixtral directory in bfloat16."""
    others = {n: p for n, p in model.state_dict().items() if ".mlp." not in n}
    if config.get("tie_word_embeddings"):
        others.pop("lm_head.weight", None)
    writer.add({n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in others.items()})
    for layer, block in enumerate(blocks):
        writer.add(expert_tensors(LAYOUTS["mixtral"], layer, block.experts(torch.bfloat16)))
    family = family_config("mixtral", settings.experts, settings.top_k, config["intermediate_size"])
    writer.close(config | family | {"torch_dtype": "bfloat16"})
