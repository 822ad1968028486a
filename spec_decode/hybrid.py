"""Look-ups where the text repeats itself, a draft model elsewhere (Liu et al., "Scaling Up, Speeding Up", 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_ext.options import option
from vllm_ext.spec_decode.draft_model import DraftModel


@dataclass(frozen=True)
class Hybrid(DraftModel):
    """The suffix automaton's draft if its match is long, the draft model's otherwise; request by request."""

    name: ClassVar[str] = "hybrid"
    runners: ClassVar[tuple[str, ...]] = ("v2",)
    counted_by_scheduler: ClassVar[bool] = False

    parallel: bool = option(False, "whether the draft model drafts in parallel (PARD)")
    switch: int = option(5, "shortest match that replaces the model's draft", unit="tokens", minimum=1)
    window: int = option(
        32768, "tokens of a request that are remembered, about 130 bytes each", unit="tokens", minimum=256
    )
    shared: int = option(
        0, "tokens of finished outputs that later requests of the tenant draft from; 0 = none", unit="tokens", minimum=0
    )
    handicap: int = option(
        5, "by how much a match in finished outputs must be longer than one in the request", unit="tokens", minimum=0
    )

    @property
    def acts_in_scheduler(self) -> bool:
        return bool(self.shared)

    def early(self, engine_args: Any) -> None:
        from vllm_ext.spec_decode.limits import check_mask_token

        super().early(engine_args)
        if self.parallel:
            check_mask_token(self.name, self.model)

    def speculator(self, vllm_config: Any, device: Any, req_states: Any) -> Any:
        from vllm_ext.spec_decode.v2_model import HybridParallelSpeculator, HybridSpeculator

        return (HybridParallelSpeculator if self.parallel else HybridSpeculator)(vllm_config, device, req_states)

    def lookup(self, requests: int, max_model_len: int) -> Any:
        from vllm_ext.spec_decode.tables import LookupSettings

        return LookupSettings(
            drafts=self.num_speculative_tokens,
            requests=requests,
            window=min(self.window, max_model_len + 1),
            shared=self.shared,
            arms=("longest", *(("shared",) if self.shared else ())),
            handicap=self.handicap,
            min_match=self.switch,
            model=True,
        )
