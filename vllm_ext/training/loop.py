"""A training run that can be interrupted: AdamW over few parameters, one checkpoint file, the same result either way.

A step may depend on the parameters, the run's settings and the number of the step, on nothing else: draw what is random
from `generator(seed, step)`. A resumed run then repeats what an uninterrupted one would have done.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_ext.evaluation.progress import bars
from vllm_ext.options import ConfigError

Metrics = Mapping[str, Tensor | float]


def generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step."""
    return torch.Generator(device=device).manual_seed((seed * 1_000_003 + step) % 2**63)


def cosine(steps: int, lr: float, floor: float, warmup: int) -> Callable[[int], float]:
    """Learning rate of each step: linear warm-up, then half a cosine from `lr` down to `floor`."""

    def rate(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        share = (step - warmup) / max(1, steps - warmup)
        return floor + (lr - floor) * 0.5 * (1 + math.cos(math.pi * share))

    return rate


def trapezoid(steps: int, lr: float, share: float = 0.2, least: float = 0.1) -> Callable[[int], float]:
    """Learning rate that rises over the first `share` of the steps and falls over the last, at least `least * lr`."""
    ramp = max(1, int(steps * share))
    return lambda step: lr * min(1.0, max((step + 1) / ramp, least), max((steps - step) / ramp, least))


@dataclass
class Run:
    """One training run.

    Attributes:
        parameters: name -> leaf tensor with gradient; what is trained and saved.
        step: called with the number of the step; leaves gradients on the parameters and returns metrics to log.
        rate: learning rate of a step.
        steps: how many.
        settings: whatever decides the result, JSON types; a checkpoint of other settings is refused.
        checkpoint: the file; it is removed by the caller once the result is written.
        every: steps between checkpoints.
        log_every: steps between entries of the history (reading a metric waits for the device).
        state: small tensors that a step changes besides the parameters; saved with them.
    """

    parameters: dict[str, Tensor]
    step: Callable[[int], Metrics]
    rate: Callable[[int], float]
    steps: int
    settings: dict[str, Any]
    checkpoint: Path
    label: str = "train"
    every: int = 100
    log_every: int = 10
    state: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    """Time spent in steps, those of interrupted runs included."""

    def fit(self, stop_after: int | None = None) -> None:
        """Train from the last checkpoint, or from the start, to the last step.

        Args:
            stop_after: leave, with a checkpoint, when this many steps are done in all.

        Raises:
            ConfigError: the checkpoint belongs to another run.
        """
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=self.rate(0), weight_decay=0.0)
        first = self._load(optimizer)
        last = self.steps if stop_after is None else min(self.steps, stop_after)
        began = time.monotonic()
        before = self.seconds
        with bars(self.label) as show:
            for step in range(first, last):
                for group in optimizer.param_groups:
                    group["lr"] = self.rate(step)
                optimizer.zero_grad(set_to_none=True)
                metrics = self.step(step)
                optimizer.step()
                done = step + 1
                if done % self.log_every == 0 or done == last:
                    self._log(step, metrics)
                    show("steps", done, self.steps)
                self.seconds = before + time.monotonic() - began
                if done % self.every == 0 or done == last:
                    self._save(optimizer, done)

    def _log(self, step: int, metrics: Metrics) -> None:
        values = {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise RuntimeError(f"{self.label}: {wrong[0]} is {values[wrong[0]]} at step {step}; lower --lr.")
        self.history.append({"step": step, "lr": self.rate(step), **values})

    def _save(self, optimizer: torch.optim.Optimizer, done: int) -> None:
        from safetensors.torch import save_file

        tensors = {f"state.{k}": v for k, v in self.state.items()}
        for name, p in self.parameters.items():
            tensors[f"value.{name}"] = p.detach()
            tensors |= {f"{key}.{name}": v for key, v in optimizer.state[p].items()}
        notes = {"done": done, "settings": self.settings, "history": self.history, "seconds": self.seconds}
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(".part")
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(tensors, part, metadata={"run": json.dumps(notes)})
        part.replace(self.checkpoint)

    def _load(self, optimizer: torch.optim.Optimizer) -> int:
        if not self.checkpoint.is_file():
            return 0
        tensors, notes = read_checkpoint(self.checkpoint)
        differing = sorted(
            k
            for k in self.settings.keys() | notes["settings"].keys()
            if self.settings.get(k) != notes["settings"].get(k)
        )
        if differing:
            key = differing[0]
            raise ConfigError(
                f"{self.checkpoint} holds an interrupted run with another {key} ({notes['settings'].get(key)!r}, not "
                f"{self.settings.get(key)!r}); finish it with its own settings or pass --restart."
            )
        for name, p in self.parameters.items():
            p.data.copy_(tensors[f"value.{name}"])
            mine = ("exp_avg", "exp_avg_sq", "step")
            optimizer.state[p] = {key: tensors[f"{key}.{name}"].to(p.device) for key in mine}
            optimizer.state[p]["step"] = optimizer.state[p]["step"].cpu()
        for name, value in self.state.items():
            value.copy_(tensors[f"state.{name}"])
        self.history, self.seconds = notes["history"], notes["seconds"]
        return int(notes["done"])


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and notes of a checkpoint.

    Raises:
        ConfigError: the file is no checkpoint of this package.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads((file.metadata() or {})["run"])
            return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} is no training checkpoint ({type(error).__name__}); pass --restart.") from error
