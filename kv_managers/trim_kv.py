"""TRIM-KV: keep what a trained gate says will be needed, decaying with age (Bui et al., ICLR 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_ext.kv_managers import trim_gates
from vllm_ext.kv_managers.method import KVMethod, Trigger
from vllm_ext.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_ext.kv_managers.view import KVView


@dataclass(frozen=True)
class TrimKV(KVMethod):
    """Score: `(now - position) * log beta`, with `log beta` from a gate on the input of the token's attention block.

    No query is read and a token is judged when it is made, so prompts are compressed while they are read and memory
    stays below `budget + stride` and a step's tokens. What no later text can foretell is lost: exact lookups suffer
    first.
    """

    name: ClassVar[str] = "trim_kv"
    trigger: ClassVar[Trigger] = "streaming"
    needs_queries: ClassVar[bool] = False
    needs_positions: ClassVar[bool] = True
    side_values: ClassVar[int] = 1
    paper_values: ClassVar[Mapping[str, Any]] = {"sinks": 0, "window": 0}

    budget: int | None = option(512, "tokens kept per KV head", unit="tokens", minimum=16)
    stride: int = option(128, "tokens between evictions", unit="tokens", minimum=16)
    window: int = option(32, "last tokens that always stay", unit="tokens", minimum=1)
    gates: str = option("", 'file of `vllm-ext train trim`; "" = the gates shipped for the model')

    def score(self, view: KVView) -> Tensor:
        from vllm_ext.kernels.kv_score_trim import retention_scores

        return retention_scores(view.side[..., 0], view.positions, view.seen)

    def load_gates(self, config: Any) -> trim_gates.TrimGates:
        """The gates for a model's Hugging Face configuration.

        Raises:
            ConfigError: no file, a damaged one, or gates of another model.
        """
        path = self.gates or trim_gates.shipped(config)
        gates = trim_gates.load(path)
        trim_gates.check_model(gates, config)
        return gates

    def check(self, vllm_config: Any) -> None:
        self.load_gates(vllm_config.model_config.hf_text_config)
        super().check(vllm_config)

    def banner(self, vllm_config: Any) -> dict[str, str]:
        trained = self.load_gates(vllm_config.model_config.hf_text_config).memory
        return super().banner(vllm_config) | {"gates": f"{self.gates or 'shipped'}, trained for {trained} tokens"}

    def attach(self, worker: Any) -> None:
        """Put the gates into the model of a worker, once it is loaded."""
        from vllm_ext.kv_managers.trim_runtime import attach

        super().attach(worker)
        attach(self, worker)
