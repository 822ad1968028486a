"""PARD: a draft model that predicts K tokens in one forward through mask tokens (An et al., ICLR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_ext.spec_decode.draft_model import DraftModel


@dataclass(frozen=True)
class Pard(DraftModel):
    """Parallel drafting; `config.json` of the draft model names its mask token (`pard_token`).

    `vllm-ext train pard` adapts a model.
    """

    name: ClassVar[str] = "pard"

    def speculative_config(self, runner: str) -> dict[str, Any]:
        parallel = {"parallel_drafting": True} if runner == "v1" else {}  # V2 has none: the speculator below does it
        return {**super().speculative_config(runner), **parallel}

    def early(self, engine_args: Any) -> None:
        from vllm_ext.spec_decode.limits import check_mask_token

        super().early(engine_args)
        check_mask_token(self.name, self.model)

    def speculator(self, vllm_config: Any, device: Any, req_states: Any) -> Any:
        from vllm_ext.spec_decode.v2_model import ParallelSpeculator

        return ParallelSpeculator(vllm_config, device)
