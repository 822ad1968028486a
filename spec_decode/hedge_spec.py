"""HedgeSpec: no-regret choice among drafters that are all scored on every verified token (Liu et al., ICLR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_ext.options import ConfigError, did_you_mean, option
from vllm_ext.spec_decode import carrier
from vllm_ext.spec_decode.draft_model import DraftModel
from vllm_ext.spec_decode.method import DrafterMethod
from vllm_ext.spec_decode.pard import Pard

ARMS = ("longest", "first", "ngram", "shared")


@dataclass(frozen=True)
class HedgeSpec(DrafterMethod):
    """NormalHedge over the look-up drafters; the one with the largest weight drafts.

    A look-up drafter is scored for free: would it have drafted the token that was verified? `longest` continues the
    longest suffix at its most recent occurrence, `first` at its first, `ngram` a suffix of at most `ngram` tokens,
    `shared` draws on the finished outputs of the tenant. A draft model is scored by its best token at each verified
    token, out of the pass that it makes over them anyway.
    """

    name: ClassVar[str] = "hedge_spec"

    drafters: tuple[str, ...] = option(
        ["longest", "first", "ngram"], "drafters to choose from: longest, first, ngram, shared"
    )
    model: str = option("", "a draft model that is one more drafter: a directory or a name (model runner V2)")
    parallel: bool = option(False, "whether the draft model drafts in parallel (PARD)")
    sampling: str = option("greedy", "how the draft model's tokens are drawn", choices=("greedy", "probabilistic"))
    scope: str = option("request", "whose record counts when a request begins", choices=("request", "tenant"))
    ngram: int = option(3, "longest suffix that the drafter `ngram` looks up", unit="tokens", minimum=1, maximum=64)
    min_match: int = option(1, "shortest suffix that is continued", unit="tokens", minimum=1, maximum=1024)
    window: int = option(
        32768, "tokens of a request that are remembered, about 130 bytes each", unit="tokens", minimum=256
    )
    shared: int = option(
        1_000_000, "tokens of finished outputs that the drafter `shared` draws on", unit="tokens", minimum=1024
    )

    def __post_init__(self) -> None:
        for arm in self.drafters:
            if arm not in ARMS:
                raise ConfigError(f"hedge_spec.drafters has no '{arm}'{did_you_mean(arm, ARMS)}")
        if len(set(self.drafters)) < 2 or len(set(self.drafters)) < len(self.drafters):
            raise ConfigError("hedge_spec.drafters must name at least two drafters, each once; add or remove one.")

    @property
    def acts_in_scheduler(self) -> bool:
        return "shared" in self.drafters or self.scope == "tenant"

    def _draft_model(self) -> DraftModel:
        kind = Pard if self.parallel else DraftModel
        return kind(num_speculative_tokens=self.num_speculative_tokens, model=self.model, sampling=self.sampling)

    def speculative_config(self, runner: str) -> dict[str, Any]:
        return self._draft_model().speculative_config(runner) if self.model else super().speculative_config(runner)

    def early(self, engine_args: Any) -> None:
        """Refuse a draft model as `DraftModel.early` does, and under V1.

        Raises:
            ConfigError: one sentence.
        """
        if not self.model:
            return
        if carrier.runner() == "v1":
            raise ConfigError("hedge_spec.model needs model runner V2; leave it out under V1.")
        from vllm_ext.spec_decode.limits import check_mask_token, check_vocabulary

        check_vocabulary(self.name, str(engine_args.model), self.model)
        if self.parallel:
            check_mask_token(self.name, self.model)

    def speculator(self, vllm_config: Any, device: Any, req_states: Any) -> Any:
        if not self.model:
            return super().speculator(vllm_config, device, req_states)
        from vllm_ext.spec_decode.v2_model import HybridParallelSpeculator, HybridSpeculator

        return (HybridParallelSpeculator if self.parallel else HybridSpeculator)(vllm_config, device, req_states)

    def lookup(self, requests: int, max_model_len: int) -> Any:
        from vllm_ext.spec_decode.tables import LookupSettings

        return LookupSettings(
            drafts=self.num_speculative_tokens,
            requests=requests,
            window=min(self.window, max_model_len + 1),
            shared=self.shared if "shared" in self.drafters else 0,
            arms=(*(("model",) if self.model else ()), *self.drafters),
            ngram=self.ngram,
            handicap=0,
            min_match=self.min_match,
            hedge=self.scope,
            model=bool(self.model),
        )
