"""How a model's thoughts are told apart: layers and thresholds by the sparsity of attention (ThinKV, ICLR 2026).

Nothing is trained. Of each layer, the density of the sparsity over many steps is estimated; layers whose density has
exactly three modes can tell execution, reasoning and transition apart, at the two minima between the modes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_ext.evaluation import corpus
from vllm_ext.kernels import kv_reference as reference
from vllm_ext.kernels import kv_score_think as formula
from vllm_ext.kv_managers.fingerprint import fingerprint
from vllm_ext.kv_managers.think_thresholds import Thoughts
from vllm_ext.options import ConfigError
from vllm_ext.training import text
from vllm_ext.training.model import Frozen, watched

Advance = Callable[[str, int, int], None]
MODES = 3
LEAST_DEPTH = 0.05
"""A valley that is shallower than this share of the density's maximum parts no modes (this package's choice)."""


@dataclass(frozen=True)
class Settings:
    """What decides the result.

    Attributes:
        texts, length: windows of text, in tokens; the second half of each is measured, so about as many tokens are
            visible as under a budget of `length`.
        window: queries of a measurement, as in `think_kv.window`.
        layers: how many tell the type (the paper: 4).
        seed: of the windows.
    """

    texts: int = 100
    length: int = 1152
    window: int = 32
    layers: int = 4
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError for values that cannot be measured with."""
        if min(self.texts, self.window, self.layers) < 1:
            raise ConfigError("--texts, --window and --layers must be at least 1.")
        if self.length < 2 * self.window:
            raise ConfigError(f"--length must be at least twice --window ({self.window}), got {self.length}.")


@torch.no_grad()
def sparsities(model: Frozen, ids: Tensor, window: int) -> Tensor:
    """[layers, m] sparsity of each `window` queries of the second half of one text, as `think_kv` measures it."""
    rows: list[Tensor] = []
    ends = range(len(ids) // 2 + window, len(ids) + 1, window)

    def watch(number: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        found = []
        for end in ends:
            queries = q[:, :, end - window : end].transpose(1, 2)
            attention = reference.window_attention(queries, k[:, :, :end], scale)
            visible = torch.arange(end - window + 1, end + 1, device=q.device)
            found.append(formula.sparsity(attention, visible))
        rows.append(torch.cat(found).cpu())

    with watched(watch):
        model.body(input_ids=ids[None].to(model.device), use_cache=False)
    return torch.stack(rows)


def density(samples: Tensor, points: int = 512) -> tuple[Tensor, Tensor]:
    """Gaussian kernel density of `samples` [n], Silverman's bandwidth: (grid over their range, density), [points]."""
    x = samples.double()
    low, high = x.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    spread = min(float(x.std()), float(high - low) / 1.34) or float(x.std())
    width = max(0.9 * spread * len(x) ** -0.2, 1e-4)
    grid = torch.linspace(float(x.min()) - 3 * width, float(x.max()) + 3 * width, points, dtype=torch.float64)
    found = torch.exp(-0.5 * ((grid[:, None] - x) / width) ** 2).mean(1) / (width * (2 * torch.pi) ** 0.5)
    return grid, found


def valleys(curve: Sequence[float]) -> list[int]:
    """Places of the minima between the modes of a density; valleys shallower than `LEAST_DEPTH` do not count."""
    at = range(1, len(curve) - 1)
    padded = [i for i in at if curve[i - 1] < curve[i] >= curve[i + 1]]
    peaks = padded or [max(range(len(curve)), key=lambda i: curve[i])]
    gaps = [min(range(a, b + 1), key=lambda i: curve[i]) for a, b in itertools.pairwise(peaks)]
    top = max(curve)
    while gaps:
        depths = [min(curve[peaks[i]], curve[peaks[i + 1]]) - curve[g] for i, g in enumerate(gaps)]
        i = min(range(len(gaps)), key=lambda i: depths[i])
        if depths[i] >= LEAST_DEPTH * top:
            break
        del gaps[i]  # the two modes are one, with the higher peak
        del peaks[i if curve[peaks[i]] < curve[peaks[i + 1]] else i + 1]
    return gaps


def thresholds(samples: Tensor) -> tuple[list[float], float]:
    """The minima between the modes of one layer's density, and how deep the shallower one is (share of the maximum)."""
    grid, found = density(samples)
    curve = found.tolist()
    places = valleys(curve)
    bounds = [0, *places, len(curve)]
    peaks = [max(curve[a:b]) for a, b in itertools.pairwise(bounds)]
    depth = min((min(peaks[i], peaks[i + 1]) - curve[g] for i, g in enumerate(places)), default=0.0) / max(curve)
    return [float(grid[i]) for i in places], depth


def choose(samples: Tensor, count: int) -> tuple[list[int], list[float], dict[str, Any]]:
    """The `count` layers with exactly three modes and the deepest valleys, and their mean thresholds.

    Args:
        samples: [layers, n].

    Returns:
        layers ascending, [low, high], notes: modes of each layer and the depths of the chosen.

    Raises:
        ConfigError: no layer has three modes.
    """
    found = [thresholds(row) for row in samples]
    able = sorted((i for i, (cuts, _) in enumerate(found) if len(cuts) == MODES - 1), key=lambda i: -found[i][1])
    modes = [len(cuts) + 1 for cuts, _ in found]
    if not able:
        raise ConfigError(
            f"no layer's sparsity has three modes on this text (modes by layer: {modes}); give texts in which the "
            "model reasons with --text, or serve think_kv without think_kv.thoughts."
        )
    layers = sorted(able[:count])
    cuts = [sum(found[i][0][side] for i in layers) / len(layers) for side in range(MODES - 1)]
    notes = {"modes_by_layer": modes, "depths": [round(found[i][1], 4) for i in layers]}
    return layers, cuts, notes


def judge(samples: Tensor, thoughts: Thoughts) -> dict[str, Any]:
    """Types of held-out windows, and whether two halves of the layers agree on them more often than by chance.

    Args:
        samples: [layers, n].
    """
    names = {formula.EXECUTION: "execution", formula.REASONING: "reasoning", formula.TRANSITION: "transition"}

    def types(layers: Sequence[int]) -> Tensor:
        values = samples[list(layers)].mean(0).tolist()
        return torch.tensor([formula.thought(x, thoughts.low, thoughts.high) for x in values])

    every = types(thoughts.layers)
    found: dict[str, Any] = {"windows": len(every)}
    found["shares"] = {name: round(float((every == kind).float().mean()), 4) for kind, name in names.items()}
    if len(thoughts.layers) > 1:
        one, other = types(thoughts.layers[::2]), types(thoughts.layers[1::2])
        same = float((one == other).float().mean())
        chance = sum(float((one == k).float().mean() * (other == k).float().mean()) for k in names)
        kappa = (same - chance) / (1 - chance) if chance < 1 else 0.0
        found |= {"halves_agree": round(same, 4), "by_chance": round(chance, 4), "kappa": round(kappa, 4)}
    return found


def measure(
    model: Frozen, texts: Sequence[str], out: Path, settings: Settings, *, advance: Advance = lambda *_: None
) -> dict[str, Any]:
    """Measure, write `out`, and return what the record says; a fifth of the texts is held out.

    Raises:
        ConfigError: too little text, or no layer with three modes.
    """
    began, tokens = time.monotonic(), text.encode(model.tokenizer, texts)
    gen = torch.Generator().manual_seed(settings.seed)
    opening = corpus.leading_special(model.tokenizer)
    ids = text.windows(tokens, settings.texts, settings.length, gen, opening)
    rows = []
    for number, row in enumerate(ids):
        advance("texts", number, len(ids))
        rows.append(sparsities(model, row, settings.window))
    advance("texts", len(ids), len(ids))
    held = len(rows) // 5
    samples = torch.cat(rows[: len(rows) - held], 1)
    layers, (low, high), notes = choose(samples, settings.layers)
    config = model.body.config.get_text_config()
    notes = {"settings": asdict(settings), "tokens": tokens.numel(), **notes}
    result = Thoughts(tuple(layers), round(low, 4), round(high, 4), fingerprint(config), notes)
    result.save(out)
    checked = judge(torch.cat(rows[len(rows) - held :], 1), result) if held else None
    return {
        **notes, "seconds": round(time.monotonic() - began, 1), "layers": layers, "low": result.low,
        "high": result.high, "held_out": checked,
    }  # fmt: skip
