"""Drafting with a smaller model of the same vocabulary (Leviathan et al., ICML 2023): vLLM's `draft_model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_ext.options import ConfigError, option
from vllm_ext.spec_decode.method import DrafterMethod


@dataclass(frozen=True)
class DraftModel(DrafterMethod):
    """K tokens one after the other; the draft model has KV pages of its own."""

    name: ClassVar[str] = "draft_model"
    counted_by_scheduler: ClassVar[bool] = True

    model: str = option("", "the draft model: a directory or a name that vLLM can load")
    sampling: str = option(
        "greedy",
        "how drafts are drawn: the most likely token, or from the model's law (rules that use it accept more)",
        choices=("greedy", "probabilistic"),
    )

    def speculative_config(self, runner: str) -> dict[str, Any]:
        return {
            "method": "draft_model",
            "model": self.model,
            "num_speculative_tokens": self.num_speculative_tokens,
            "draft_sample_method": self.sampling,
        }

    def early(self, engine_args: Any) -> None:
        """Refuse a draft model that cannot be read or has another vocabulary, while only names are known.

        Raises:
            ConfigError: one sentence.
        """
        from vllm_ext.spec_decode.limits import check_vocabulary

        if not self.model:
            raise ConfigError(
                f"{self.name}.model is empty; name the draft model, e.g. "
                f"--additional-config.vllm_ext.{self.name}.model DIRECTORY."
            )
        check_vocabulary(self.name, str(engine_args.model), self.model)

    def speculator(self, vllm_config: Any, device: Any, req_states: Any) -> Any:
        from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

        return StandaloneARSpeculator(vllm_config, device)
