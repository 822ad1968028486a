"""How many drafts pay: CAST for chains (ICLR 2026), from measured step times. Numpy on the scheduler's host thread.

A step of B requests that verify M drafts in all emits `B + sum of survival` tokens in expectation and takes the time of
a measured table. The policy takes the M that gives the most tokens a second, and spends it on the drafts that are most
likely to survive, whatever their request.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ext.options import ConfigError
from vllm_ext.spec_decode.protocols import LengthInput


@dataclass(frozen=True)
class CostTable:
    """Seconds of a step, drafting included.

    Attributes:
        batch: [b] ascending request counts.
        drafts: [d] ascending drafts a request, from 0.
        context: [c] ascending tokens a request.
        seconds: [c, b, d] float64.
        about: what it was measured on: `device`, `model`, `drafter`.
    """

    batch: np.ndarray
    drafts: np.ndarray
    context: np.ndarray
    seconds: np.ndarray
    about: dict[str, Any]

    def at(self, requests: int, context: float) -> np.ndarray:
        """Seconds by drafts a request [d]: the next measured batch (graphs are padded), linear in the context.

        Beyond the largest batch the time grows in proportion.
        """
        b = min(int(np.searchsorted(self.batch, requests)), len(self.batch) - 1)
        beyond = max(1.0, requests / float(self.batch[b]))
        times = self.seconds[:, b] * beyond
        if len(self.context) == 1:
            return times[0]
        c = int(np.clip(np.searchsorted(self.context, context) - 1, 0, len(self.context) - 2))
        low, high = self.context[c : c + 2]
        w = min(max((context - low) / (high - low), 0.0), 1.0)
        return (1 - w) * times[c] + w * times[c + 1]


def read_table(path: str) -> CostTable:
    """The table that `vllm-ext bench cost-table` wrote.

    Raises:
        ConfigError: no such file, no such record, or times that are not positive.
    """
    try:
        record = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        [result] = record["results"]
        axes = [np.asarray(result[name], dtype=np.float64) for name in ("batch", "drafts", "context")]
        seconds = np.asarray(result["seconds"], dtype=np.float64)
        if seconds.shape != tuple(len(axes[i]) for i in (2, 0, 1)) or not (seconds > 0).all() or axes[1][0] != 0:
            raise ValueError("its times do not fit its axes")
        if any((np.diff(axis) <= 0).any() for axis in axes):
            raise ValueError("its axes do not ascend")
        about = {name: result.get(name) for name in ("device", "model", "drafter")}
    except OSError as error:
        raise ConfigError(
            f"cast.table '{path}' cannot be read ({error.strerror}); make one with `vllm-ext bench cost-table`."
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"cast.table '{path}' is no cost table ({error}); make one with `vllm-ext bench cost-table`."
        ) from None
    return CostTable(axes[0], axes[1], axes[2], seconds, about)


SHAPE = ("hidden_size", "num_hidden_layers", "vocab_size")
"""What of a model's configuration decides its times, as far as a table can tell."""


def model_shape(hf_text_config: Any) -> dict[str, int]:
    """The sizes by which a table knows its model again."""
    return {name: int(getattr(hf_text_config, name)) for name in SHAPE}


def check_table(table: CostTable, vllm_config: Any, choices: tuple[int, ...]) -> None:
    """Refuse a table of another device or model, or one that does not reach the draft lengths.

    Raises:
        ConfigError: one sentence with the remedy.
    """
    from vllm.platforms import current_platform

    remedy = "make one here with `vllm-ext bench cost-table`."
    device = current_platform.get_device_name()
    if table.about["device"] != device:
        raise ConfigError(f"cast.table was measured on '{table.about['device']}', this device is '{device}'; {remedy}")
    shape = model_shape(vllm_config.model_config.hf_text_config)
    if table.about["model"] != shape:
        raise ConfigError(
            f"cast.table was measured with a model of {table.about['model']}, this one is {shape}; {remedy}"
        )
    if max(choices) > table.drafts[-1]:
        raise ConfigError(
            f"cast.lengths reaches {max(choices)} drafts, cast.table {table.drafts[-1]:g}; lower cast.lengths or the "
            "drafter's num_speculative_tokens, or measure longer drafts."
        )


def uniform_length(survival: np.ndarray, seconds: np.ndarray, margin: float) -> int:
    """The number of drafts, the same for every request, with the most tokens a second.

    Args:
        survival: [B, K], see `LengthInput`.
        seconds: [K+1] of a step with that many drafts a request; inf = not a choice.
        margin: 0 is kept unless another length is better by this factor.
    """
    tokens = np.concatenate([[1.0], 1.0 + survival.mean(0).cumsum()])
    rate = tokens / seconds
    best = int(rate.argmax())
    return best if rate[best] >= margin * rate[0] else 0


def ragged_lengths(survival: np.ndarray, seconds: np.ndarray, margin: float) -> np.ndarray:
    """Drafts of each request [B]: the total that gives the most tokens a second, to the likeliest drafts.

    `seconds` [K+1] as in `uniform_length`; totals between two lengths are timed linearly. Survival never rises along a
    request, so the largest entries are a prefix of each.
    """
    requests, k = survival.shape
    flat = survival.ravel()
    order = np.argsort(-flat, kind="stable")
    tokens = requests + np.concatenate([[0.0], flat[order].cumsum()])
    rate = tokens / np.interp(np.arange(requests * k + 1) / requests, np.arange(k + 1), seconds)
    best = int(rate.argmax())
    if rate[best] < margin * rate[0]:
        best = 0
    return np.bincount(order[:best] // k, minlength=requests)


class CastPolicy:
    """CAST as a length policy.

    Args:
        table: measured times.
        margin: see `uniform_length`.
        probing: share of the time that may go into drafts that do not pay, to notice when they do again.
    """

    def __init__(self, table: CostTable, margin: float, probing: float) -> None:
        self.table = table
        self.margin = margin
        self.probing = probing
        self.debt = 0.0
        """Time saved up for the next probe, in steps."""

    def choose(self, known: LengthInput) -> np.ndarray:
        """[B] int64 drafts of each request; if uniform, one of `known.choices`."""
        requests, k = known.survival.shape
        if requests == 0:
            return np.zeros(0, dtype=np.int64)
        times = self.table.at(requests, float(known.context.mean()))
        seconds = np.interp(np.arange(k + 1), self.table.drafts, times)
        choices = np.asarray([c for c in known.choices if c <= k], dtype=np.int64)
        if known.uniform:
            barred = np.full(k + 1, np.inf)
            barred[choices] = seconds[choices]
            length = uniform_length(known.survival, barred, self.margin)
            lengths = np.full(requests, length, dtype=np.int64)
        else:
            lengths = np.minimum(ragged_lengths(known.survival, seconds, self.margin), choices[-1])
        if len(choices) > 1 and not lengths.all():
            lengths = self._probe(lengths, int(choices[1]), seconds)
        return lengths

    def _probe(self, lengths: np.ndarray, least: int, seconds: np.ndarray) -> np.ndarray:
        """`least` drafts for the requests without any, as soon as earlier steps have saved up their time."""
        tried = np.where(lengths == 0, least, lengths)
        before, after = np.interp([lengths.mean(), tried.mean()], np.arange(len(seconds)), seconds)
        self.debt += self.probing
        if self.debt * before < after - before:
            return lengths
        self.debt = 0.0
        return tried

    def observe(self, drafted: np.ndarray, accepted: np.ndarray, seconds: float) -> None:
        """Nothing: times are those of the table, survival comes with every step."""


class FixedPolicy:
    """The same number of drafts for every request and step.

    Args:
        drafts: that number; the largest choice not above it is taken.
    """

    def __init__(self, drafts: int) -> None:
        self.drafts = drafts

    def choose(self, known: LengthInput) -> np.ndarray:
        """[B] int64."""
        length = max(c for c in known.choices if c <= self.drafts)
        return np.full(len(known.survival), length, dtype=np.int64)

    def observe(self, drafted: np.ndarray, accepted: np.ndarray, seconds: float) -> None:
        """Nothing."""
