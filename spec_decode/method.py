"""What a speculation plugin declares: options, and which part of a step it fills. Imports neither torch nor vLLM."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vllm_ext.options import option

if TYPE_CHECKING:
    from vllm_ext.spec_decode.protocols import LengthPolicy, Verifier
    from vllm_ext.spec_decode.tables import LookupSettings


SCHEDULER: dict[str, Any] = {"scheduler_cls": "vllm_ext.spec_decode.scheduler.SpeculationScheduler"}
"""Engine arguments of plugins that act, or count, in the scheduler."""


@dataclass(frozen=True)
class SpecMethod:
    """Base of all speculation plugins. `part` says what it fills; at most one plugin of each part is on."""

    name: ClassVar[str]
    part: ClassVar[Literal["drafter", "verifier", "length", "selector"]]
    unavailable: ClassVar[dict[str, str]] = dict.fromkeys(
        ("tree", "width", "branches", "drafts_per_position"),
        "vLLM verifies one chain of drafts a request, no tree; leave it out.",
    )
    """Options of published methods that wait for tree attention, and why."""

    @property
    def kind(self) -> str:
        """Its kind in plugins.yaml: the part that it fills."""
        return self.part

    def engine_args(self) -> dict[str, Any]:
        """Stock vLLM engine arguments that this plugin needs."""
        return {}

    def attach(self, worker: Any) -> None:
        """Enter a worker process, before its model runner is made."""
        from vllm_ext.spec_decode.glue import attach

        attach(worker.vllm_config)

    def check(self, vllm_config: Any) -> None:
        """Refuse a configuration that the method cannot serve: ConfigError, one sentence with option and remedy."""
        from vllm_ext.spec_decode.limits import check

        check(self, vllm_config)

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """What the start-up banner says of this plugin, label -> text."""
        from vllm_ext.spec_decode.limits import banner

        return banner(self, vllm_config)

    def options(self) -> dict[str, Any]:
        """The options as a plain mapping (JSON types)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class VerifierMethod(SpecMethod):
    """A verification rule."""

    part: ClassVar[Literal["verifier"]] = "verifier"
    lossless: ClassVar[bool] = True
    needs_draft_law: ClassVar[bool] = False
    runners: ClassVar[tuple[str, ...]] = ("v1", "v2")

    def verifier(self, vocab_size: int, device: Any) -> Verifier:
        """The rule, made once per worker."""
        raise NotImplementedError


@dataclass(frozen=True)
class LengthMethod(SpecMethod):
    """A policy of draft lengths."""

    part: ClassVar[Literal["length"]] = "length"

    lengths: tuple[int, ...] = option(
        [0, 2, 4, 7], "draft counts to choose from, each captured as a graph; 0 is always one", unit="tokens", minimum=0
    )

    @property
    def uniform(self) -> bool:
        """Whether all requests of a step get the same draft count."""
        return True

    def choices(self, most: int) -> tuple[int, ...]:
        """The draft counts to choose from, for a drafter of at most `most`; ascending, 0 among them."""
        return tuple(sorted({0, *(min(n, most) for n in self.lengths)}))

    def engine_args(self) -> dict[str, Any]:
        """The scheduler that asks the policy, and every draft count in vLLM's schedule, so that it is captured."""
        counts = sorted({0, *self.lengths}, reverse=True)  # few requests at a time: the longest are kept
        ranges = [[i + 1, i + 1, n] for i, n in enumerate(counts)]
        return {"speculative_config": {"num_speculative_tokens_per_batch_size": ranges}} | SCHEDULER

    def policy(self, vllm_config: Any) -> LengthPolicy:
        """The policy, made once per scheduler.

        Raises:
            ConfigError: e.g. a cost table that cannot be read or is of another device or model.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class DrafterMethod(SpecMethod):
    """Proposes tokens."""

    part: ClassVar[Literal["drafter"]] = "drafter"
    runners: ClassVar[tuple[str, ...]] = ("v1", "v2")
    counted_by_scheduler: ClassVar[bool] = False
    """Look-up drafters count in their worker, by arm; others have the scheduler count for them."""

    num_speculative_tokens: int = option(
        7, "most tokens drafted for a request in a step", unit="tokens", minimum=1, maximum=32
    )
    """Seven drafts and the verified token are the eight query rows that the sparse attention kernels take."""

    def engine_args(self) -> dict[str, Any]:
        """The speculative_config that carries this drafter on the model runner that vLLM will use here."""
        from vllm_ext.spec_decode.carrier import runner

        args: dict[str, Any] = {"speculative_config": self.speculative_config(runner())}
        return args | (SCHEDULER if self.acts_in_scheduler else {})

    @property
    def acts_in_scheduler(self) -> bool:
        """Whether the scheduler has to count for the drafter, or to tell it whose text a request is."""
        return self.counted_by_scheduler

    def speculative_config(self, runner: str) -> dict[str, Any]:
        """vLLM's speculative_config under model runner "v1" or "v2"."""
        k = self.num_speculative_tokens
        if runner == "v2":  # a method that V2 and async scheduling take and that needs no checkpoint
            return {"method": "ngram_gpu", "num_speculative_tokens": k, "prompt_lookup_min": 1, "prompt_lookup_max": 1}
        return {"method": "custom_class", "model": "vllm_ext.spec_decode.v1.Proposer", "num_speculative_tokens": k}

    def speculator(self, vllm_config: Any, device: Any, req_states: Any) -> Any:
        """vLLM's speculator of this drafter under model runner V2."""
        from vllm_ext.spec_decode.v2 import LookupSpeculator

        return LookupSpeculator(vllm_config, device, req_states)

    def lookup(self, requests: int, max_model_len: int) -> LookupSettings | None:
        """What the look-up part of the drafter needs; None if it has none."""
        return None
