"""Self-distillation of SeerAttention-R gates: each layer's gate learns its own layer's pooled attention.

Target of a query: its attention weights, the largest in each block and over the group's heads, normalised (paper,
section 3.2). Loss: KL(target || gate), mean over queries and KV heads, summed over layers; no gradient goes through the
model. A query's own block is left out on both sides: it is always read and has no gate key yet when it is.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_ext.attention_backends import gate_file
from vllm_ext.attention_backends.rope import check_rotation, inverse_frequencies
from vllm_ext.evaluation import corpus
from vllm_ext.kernels import reference_gate as gate
from vllm_ext.options import ConfigError
from vllm_ext.training import loop, text
from vllm_ext.training.model import Frozen, watched

LOSS_SCALE = 10.0
"""The paper's; AdamW hardly sees it."""


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run.

    Attributes:
        steps, batch, window: batches of `batch` windows of `window` tokens; window is a multiple of page_size.
        rows: queries a window that are compared, drawn from its second half.
        passkeys: share of the windows that hide passkeys and ask for them.
        width: channels of a gate; the head size by default.
        noise: random part of the gates' start, 1 = the published code's.
        budget: pages whose attention mass the evaluation counts.
    """

    steps: int = 800
    batch: int = 4
    window: int = 4096
    rows: int = 512
    page_size: int = 64
    width: int | None = None
    lr: float = 1e-3
    lr_floor: float = 1e-5
    warmup: int = 20
    passkeys: float = 0.25
    seed: int = 0
    noise: float = 0.1
    budget: int = 16

    def check(self) -> None:
        """Raise ConfigError for values that cannot be trained with."""
        if self.window % self.page_size or self.window < 4 * self.page_size:
            raise ConfigError(
                f"--window {self.window} must be a multiple of --page-size {self.page_size} and at least four of it."
            )
        if self.width not in (None, *gate_file.WIDTHS):
            raise ConfigError(f"--width must be one of {', '.join(map(str, gate_file.WIDTHS))}, got {self.width}.")
        if min(self.steps, self.batch, self.rows) < 1:
            raise ConfigError("--steps, --batch and --rows must be at least 1.")
        if not 0 <= self.passkeys <= 1:
            raise ConfigError(f"--passkeys must be between 0 and 1, got {self.passkeys}.")


def default_width(head_size: int) -> int:
    """The head size where the kernels take it, else the next smaller power of two."""
    return max(w for w in gate_file.WIDTHS if w <= max(head_size, gate_file.WIDTHS[0]))


class Gates:
    """The gates of all layers as parameters, and what the watcher of a step needs."""

    def __init__(self, model: Frozen, settings: Settings) -> None:
        self.model, self.settings = model, settings
        shape = model.shape
        self.width = settings.width or default_width(shape.head_size)
        size = gate_file.shapes(shape, self.width)
        gen = loop.generator(settings.seed, -1)
        self.layers = [self._initial(size, gen) for _ in range(shape.layers)]
        freq = torch.tensor(inverse_frequencies(shape.rope, shape.head_size))
        gate_freq = torch.tensor(inverse_frequencies(shape.rope, self.width))
        positions = torch.arange(settings.window)
        self.tables = [t.to(model.device) for t in gate.rope_tables(freq, positions)]
        self.gate_tables = [t.to(model.device) for t in gate.rope_tables(gate_freq, positions)]

    def _initial(self, size: dict[str, tuple[int, ...]], gen: torch.Generator) -> dict[str, Tensor]:
        """Where training begins: near the product of the group's mean query with the block's mean key.

        The published code starts from noise alone (Xavier-uniform) and sees hundreds of millions of tokens.
        """

        def noise(shape: tuple[int, ...]) -> Tensor:
            bound = math.sqrt(6 / (shape[-2] + shape[-1]))
            return (torch.rand(shape, generator=gen) * 2 - 1) * bound * self.settings.noise

        start = {"q": noise(size["q"]), "k": noise(size["k"])}
        same = torch.eye(size["q"][-2], self.width)
        start["q"] += same / math.sqrt(size["q"][1])
        start["k"][:, -same.shape[0] :] += same  # the pools' order is max, min, mean
        start |= {k: torch.ones(size[k]) for k in ("q_norm", "k_norm")}
        return {k: v.to(self.model.device).requires_grad_() for k, v in start.items()}

    def parameters(self) -> dict[str, Tensor]:
        """Name -> leaf, as in the file."""
        return {gate_file.tensor_name(i, k): v for i, layer in enumerate(self.layers) for k, v in layer.items()}

    def plain(self, x: Tensor, positions: Tensor | slice) -> Tensor:
        """x [B, heads, tokens, D] with the rotation undone."""
        return gate.unrotate(x, self.tables[0][positions], self.tables[1][positions])

    def logits(self, layer: int, q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
        """Gate logits [B, H, r, N] of the queries at `rows` and all blocks; q, k as attention sees them."""
        page, w = self.settings.page_size, self.layers[layer]
        pooled = gate.pool(self.plain(k, slice(0, k.shape[2])).unflatten(2, (-1, page))).transpose(1, 2)
        first = torch.arange(0, k.shape[2], page, device=k.device)
        queries = self.plain(q[:, :, rows], rows).transpose(1, 2)
        cos, sin = self.gate_tables
        with torch.enable_grad():
            keys = gate.gate_keys(pooled, w["k"], w["k_norm"], cos[first], sin[first])
            asks = gate.gate_queries(queries, w["q"].flatten(1, 2), w["q_norm"], cos[rows], sin[rows])
            return torch.einsum("brhe,bnhe->bhrn", asks, keys) / math.sqrt(self.width)


def divergence(logits: Tensor, target: Tensor, complete: Tensor) -> Tensor:
    """KL(target || softmax(logits)) over blocks that `complete` [r, N] allows: [B, H, r, N] twice -> scalar mean."""
    target = target * complete
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-9)
    log_gate = logits.masked_fill(~complete, -1e9).log_softmax(-1)
    return (torch.xlogy(target, target) - target * log_gate).sum(-1).mean()


def batch_ids(model: Frozen, tokens: Tensor, s: Settings, step: int) -> Tensor:
    """Token ids of one step: [batch, window], the first rows with passkeys."""
    gen = loop.generator(s.seed, step)
    ids = text.windows(tokens, s.batch, s.window, gen, corpus.leading_special(model.tokenizer))
    share = s.passkeys * s.batch
    count = int(share) + int(torch.rand((), generator=gen) < share - int(share))
    for i in range(count):
        number = step * s.batch + i
        ids[i] = torch.tensor(text.passkeys(model.tokenizer, tokens, s.window, s.window // 4, s.seed, number))
    return ids


def step_loss(gates: Gates, ids: Tensor, step: int) -> dict[str, Tensor]:
    """Run the model once, leave the gates' gradients, return the mean KL of a layer."""
    s, device = gates.settings, gates.model.device
    gen = loop.generator(s.seed + 1, step)
    half = s.window // 2
    rows = (half + torch.randperm(s.window - half, generator=gen)[: s.rows]).sort().values.to(device)
    complete = torch.arange(s.window // s.page_size, device=device) < (rows // s.page_size)[:, None]
    total = torch.zeros((), device=device)

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        target = gate.max_pooled_attention(q, k, rows, s.page_size, scale)
        logits = gates.logits(layer, q, k, rows)
        with torch.enable_grad():
            loss = divergence(logits, target, complete)
            (LOSS_SCALE * loss).backward()
        total.add_(loss.detach())

    with torch.no_grad(), watched(watch):
        gates.model.body(input_ids=ids.to(device), use_cache=False)
    return {"kl": total / len(gates.layers)}


def evaluate(gates: Gates, windows: list[list[int]]) -> dict[str, float]:
    """Share of the attention mass that `budget` blocks hold, mean over layers, heads and queries of held-out text.

    Returns:
        `gate`: chosen by the gate; `best`: by the mass itself; `mean_key`: by the product with the block's mean key;
        and `kl`. The query's own block, which all read, is not counted.
    """
    s, device = gates.settings, gates.model.device
    rows = torch.arange(s.window // 2, s.window, max(1, s.window // 128), device=device)
    complete = torch.arange(s.window // s.page_size, device=device) < (rows // s.page_size)[:, None]
    sums = dict.fromkeys(("gate", "best", "mean_key", "kl"), 0.0)

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        (b, h, n, d), page = k.shape, s.page_size
        x = q[:, :, rows].float().reshape(b, h, -1, d) @ k.float().transpose(-1, -2)
        x = x.unflatten(2, (-1, rows.numel())) * scale
        x = x.masked_fill(torch.arange(n, device=device) > rows[:, None], -math.inf).softmax(-1)
        mass = x.unflatten(-1, (-1, page)).sum(-1).mean(2) * complete
        logits = gates.logits(layer, q, k, rows).detach()
        mean_key = k.float().unflatten(2, (-1, page)).mean(3)
        group_mean = q[:, :, rows].float().unflatten(1, (h, -1)).mean(2)
        scores = {"gate": logits, "best": mass, "mean_key": group_mean @ mean_key.transpose(-1, -2)}
        for name, score in scores.items():
            top = score.masked_fill(~complete, -1e9).topk(min(s.budget, mass.shape[-1]), -1).indices
            sums[name] += (mass.gather(-1, top).sum(-1) / mass.sum(-1)).mean().item()
        target = gate.max_pooled_attention(q, k, rows, page, scale)
        sums["kl"] += divergence(logits, target, complete).item()

    with torch.no_grad(), watched(watch):
        for ids in windows:
            gates.model.body(input_ids=torch.tensor([ids], device=device), use_cache=False)
    return {k: v / (len(windows) * len(gates.layers)) for k, v in sums.items()}


def train(
    model: Frozen, texts: list[str], out: Path, settings: Settings, *, checkpoint: Path, stop_after: int | None = None,
    windows: int = 4,
) -> dict[str, Any]:  # fmt: skip
    """Train the gates, write them to `out`, and return the training record's results (JSON types).

    Raises:
        ConfigError: settings, text or checkpoint do not fit.
    """
    settings.check()
    check_rotation(model.body.config)
    tokens = text.encode(model.tokenizer, texts)
    gates = Gates(model, settings)
    held_out = corpus.windows(model.tokenizer, windows, settings.window) if windows else []
    before = evaluate(gates, held_out) if held_out else {}
    run = loop.Run(
        gates.parameters(),
        lambda step: step_loss(gates, batch_ids(model, tokens, settings, step), step),
        loop.cosine(settings.steps, settings.lr, settings.lr_floor, settings.warmup),
        settings.steps,
        {**asdict(settings), "model": model.shape.to_json(), "tokens": tokens.numel()},
        checkpoint,
        label="train seer",
    )
    run.fit(stop_after)
    judged = {"before": before}
    results = {"settings": run.settings, "seconds": run.seconds, "history": run.history, "held_out": judged}
    if stop_after is not None and stop_after < settings.steps:
        return results
    judged["after"] = evaluate(gates, held_out) if held_out else {}
    layers = [{k: v.detach().to("cpu", torch.bfloat16) for k, v in layer.items()} for layer in gates.layers]
    gate_file.write(out, layers, model.shape, settings.page_size, trained_on=model.name, steps=settings.steps)
    checkpoint.unlink(missing_ok=True)
    return results
