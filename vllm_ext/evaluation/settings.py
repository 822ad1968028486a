"""What one evaluation measures, as a JSON-ready value that can be handed to a fresh process."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

from vllm_ext.evaluation.niah import CITIES, MOST_VALUES
from vllm_ext.options import ConfigError

TASKS = ("niah", "kl", "ppl", "gen")
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Settings:
    """Everything but the plugins.

    Attributes:
        model: directory or hub name.
        tasks: a subset of `TASKS`.
        lengths: prompt tokens of each cell (niah), context tokens before the judged positions (kl, ppl) or before what
            is generated (gen).
        samples: needles a cell.
        keys, values: see `niah.make_niah`.
        decode_question: feed question and begun answer through decode steps instead of the prefill.
        chat: use the chat template in niah.
        positions: judged decode positions of a text (kl, ppl).
        texts: held-out texts a cell (kl, ppl, gen).
        output: generated tokens of a text (gen).
        dtype: vLLM's dtype.
        seed: of the needles and, as the engine's, of what is generated.
        batch: requests that run at once (vLLM's max_num_seqs).
        eager: no CUDA graphs and no torch.compile.
        memory: vLLM's gpu_memory_utilization; below its default because logits are kept beside the engine.
        kv_memory: GiB of the KV cache, instead of what `memory` leaves; then nothing is asked of the memory that other
            processes hold, and several evaluations can share a GPU. None = by `memory`.
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
    output: int = 1000
    dtype: str = "auto"
    seed: int = 0
    batch: int = 32
    eager: bool = False
    memory: float = 0.8
    kv_memory: float | None = None

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
        if "gen" in self.tasks and (self.texts < 2 or self.output < 8):
            need = "--task gen needs at least 2 --texts for its intervals and 8 tokens of --output"
            raise ConfigError(f"{need}, got {self.texts} and {self.output}.")
        if self.keys > len(CITIES) or self.values > MOST_VALUES:
            limits = f"--keys must be at most {len(CITIES)} and --values at most {MOST_VALUES}"
            raise ConfigError(f"{limits}, got {self.keys} and {self.values}.")
        if not self.lengths or min(self.lengths) < 128:
            raise ConfigError(f"--length must be at least 128 tokens, got {min(self.lengths, default=0)}.")
        if not 0.05 <= self.memory <= 0.98:
            raise ConfigError(f"--memory must be between 0.05 and 0.98, got {self.memory}.")
        if self.kv_memory is not None:
            check_kv_memory(self.kv_memory)

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
                if "gen" in self.tasks:
                    corpus.windows(tokenizer, self.texts, length)
            except ValueError as error:
                option = "--no-chat" if "chat template" in str(error) else "--length"
                raise ConfigError(f"--length {length} cannot be built: {error} Change {option}.") from None

    @property
    def longest(self) -> int:
        """Tokens of the longest request, output included."""
        answer = ANSWER_TOKENS * self.values if "niah" in self.tasks else 0
        judged = self.positions + 1 if {"kl", "ppl"} & set(self.tasks) else 0
        free = self.output + 1 if "gen" in self.tasks else 0
        return max(self.lengths) + max(answer, judged, free)

    @property
    def forces(self) -> bool:
        """Whether a task feeds given text through decode steps; vLLM takes no drafts beside that."""
        return bool({"kl", "ppl"} & set(self.tasks)) or ("niah" in self.tasks and self.decode_question)

    def engine_args(self) -> dict[str, Any]:
        """Arguments of `vllm.LLM` without those of the plugins."""
        from vllm_ext.evaluation.teacher import PROCESSOR

        memory: dict[str, Any] = {"gpu_memory_utilization": self.memory}
        if self.kv_memory is not None:
            # vLLM plans nothing by the share then, but still refuses to start where less than it is free.
            memory = {"gpu_memory_utilization": 0.01, "kv_cache_memory_bytes": int(self.kv_memory * 2**30)}
        return {
            "dtype": self.dtype,
            "max_model_len": self.longest,
            "max_num_seqs": self.batch,
            **memory,
            "enforce_eager": self.eager,
            "logits_processors": [PROCESSOR] if self.forces else None,
            "seed": self.seed,
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


def check_kv_memory(size: float) -> None:
    """Refuse a size of the KV cache, in GiB, that vLLM could not take or would replace.

    Raises:
        ConfigError: not a positive number, or a CPU engine whose environment sets another size.
    """
    if not (size > 0 and math.isfinite(size)):
        raise ConfigError(f"--kv-memory must be more than 0 GiB, got {size}.")
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            raise ConfigError("VLLM_CPU_KVCACHE_SPACE replaces --kv-memory on a CPU; unset one of them.")
