"""What one evaluation measures, as a JSON-ready value that can be handed to a fresh process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vllm_ext.evaluation.niah import CITIES, MOST_VALUES
from vllm_ext.options import ConfigError

TASKS = ("niah", "kl", "ppl")
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Settings:
    """Everything but the plugins.

    Attributes:
        model: directory or hub name.
        tasks: a subset of `TASKS`.
        lengths: prompt tokens of each cell (niah), context tokens before the judged positions (kl, ppl).
        samples: needles a cell.
        keys, values: see `niah.make_niah`.
        decode_question: feed question and begun answer through decode steps instead of the prefill.
        chat: use the chat template in niah.
        positions: judged decode positions of a text (kl, ppl).
        texts: held-out texts a cell (kl, ppl).
        dtype: vLLM's dtype.
        seed: of the needles.
        batch: requests that run at once (vLLM's max_num_seqs).
        eager: no CUDA graphs and no torch.compile.
        memory: vLLM's gpu_memory_utilization; below its default because logits are kept beside the engine.
    """

    model: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = (2048,)
    samples: int = 20
    keys: int = 1
    values: int = 1
    decode_question: bool = False
    chat: bool = True
    positions: int = 64
    texts: int = 8
    dtype: str = "auto"
    seed: int = 0
    batch: int = 32
    eager: bool = False
    memory: float = 0.8

    def check(self) -> None:
        """Refuse values that measure nothing.

        Raises:
            ConfigError: one sentence that names the option.
        """
        unknown = [t for t in self.tasks if t not in TASKS]
        if unknown or not self.tasks:
            raise ConfigError(f"--task must be one of {', '.join(TASKS)}, got '{''.join(unknown[:1])}'.")
        positive = {"samples": self.samples, "keys": self.keys, "values": self.values, "positions": self.positions}
        positive |= {"texts": self.texts, "batch": self.batch}
        for name, value in positive.items():
            if value < 1:
                raise ConfigError(f"--{name} must be at least 1, got {value}.")
        if self.keys > len(CITIES) or self.values > MOST_VALUES:
            limits = f"--keys must be at most {len(CITIES)} and --values at most {MOST_VALUES}"
            raise ConfigError(f"{limits}, got {self.keys} and {self.values}.")
        if not self.lengths or min(self.lengths) < 128:
            raise ConfigError(f"--length must be at least 128 tokens, got {min(self.lengths, default=0)}.")
        if not 0.05 <= self.memory <= 0.98:
            raise ConfigError(f"--memory must be between 0.05 and 0.98, got {self.memory}.")

    def check_prompts(self) -> None:
        """Build one prompt of every cell, so that a length that cannot be built ends the command before any engine.

        Raises:
            ConfigError: no usable tokenizer, no chat template, or a length without room for text.
        """
        from transformers import AutoTokenizer

        from vllm_ext.evaluation import corpus, niah

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
        except Exception as error:  # transformers raises many types here
            reason = str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
            raise ConfigError(f"model '{self.model}' has no usable tokenizer ({reason}); add its files.") from None
        for length in self.lengths:
            try:
                if "niah" in self.tasks:
                    niah.make_niah(
                        tokenizer, length, 0.5, self.seed, keys=self.keys, values=self.values, chat=self.chat
                    )
                if {"kl", "ppl"} & set(self.tasks):
                    corpus.windows(tokenizer, self.texts, length + self.positions + 1)
            except ValueError as error:
                option = "--no-chat" if "chat template" in str(error) else "--length"
                raise ConfigError(f"--length {length} cannot be built: {error} Change {option}.") from None

    @property
    def longest(self) -> int:
        """Tokens of the longest request, output included."""
        answer = ANSWER_TOKENS * self.values if "niah" in self.tasks else 0
        judged = self.positions + 1 if {"kl", "ppl"} & set(self.tasks) else 0
        return max(self.lengths) + max(answer, judged)

    def engine_args(self) -> dict[str, Any]:
        """Arguments of `vllm.LLM` without those of the plugins."""
        from vllm_ext.evaluation.teacher import PROCESSOR

        return {
            "dtype": self.dtype,
            "max_model_len": self.longest,
            "max_num_seqs": self.batch,
            "gpu_memory_utilization": self.memory,
            "enforce_eager": self.eager,
            "logits_processors": [PROCESSOR],
            "disable_log_stats": True,
        }

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Settings:
        """The inverse of `to_json` after a trip through JSON."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)
