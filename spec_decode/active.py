"""The speculation plugins of an engine, by the part that they fill; what a worker publishes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_ext import config
from vllm_ext.spec_decode.method import DrafterMethod, LengthMethod, SpecMethod, VerifierMethod

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_ext.spec_decode.tables import LookupDrafter, LookupSettings
    from vllm_ext.spec_metrics import Publisher

TENANT = "vllm_ext_tenant"
"""Key in `SamplingParams.extra_args`: whose text a request is; the engine sets it to the request's cache salt."""


def methods(vllm_config: VllmConfig) -> dict[str, SpecMethod]:
    """The selected speculation plugins, part -> plugin."""
    plugins = config.from_additional(vllm_config.additional_config).values()
    return {p.part: p for p in plugins if isinstance(p, SpecMethod)}


def drafter(vllm_config: VllmConfig) -> DrafterMethod | None:
    """The drafter, or None."""
    found = methods(vllm_config).get("drafter")
    return found if isinstance(found, DrafterMethod) else None


def lookup(vllm_config: VllmConfig) -> LookupSettings:
    """The settings of the selected drafter's look-ups."""
    method = drafter(vllm_config)
    scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
    settings = method.lookup(scheduler.max_num_seqs, model.max_model_len) if method else None
    if settings is None:
        raise RuntimeError("the selected drafter looks nothing up")
    return settings


def verifier(vllm_config: VllmConfig) -> VerifierMethod | None:
    """The verification rule, or None for vLLM's own."""
    found = methods(vllm_config).get("verifier")
    return found if isinstance(found, VerifierMethod) else None


def length(vllm_config: VllmConfig) -> LengthMethod | None:
    """The policy of draft lengths, or None for a fixed length."""
    found = methods(vllm_config).get("length")
    return found if isinstance(found, LengthMethod) else None


def tenant(sampling_params: Any) -> str | None:
    """The tenant of a request, or None."""
    extra = getattr(sampling_params, "extra_args", None) or {}
    found = extra.get(TENANT)
    return None if found is None else str(found)


class SpecCounters:
    """What a worker publishes of its look-up drafters, by arm."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._publisher = _publisher(vllm_config)

    def publish(self, drafter: LookupDrafter) -> None:
        """Hand the totals on; cheap, so after every step."""
        from vllm_ext.spec_decode.lookup import ARMS

        self._publisher.publish(ARMS, drafter.counters, float(drafter.seconds[0]))


class DraftCounters:
    """Counts the drafts of a drafter that looks nothing up, as the scheduler sees them come back.

    Args:
        drafts: K, the most drafts of a step.
    """

    def __init__(self, vllm_config: VllmConfig, name: str, drafts: int) -> None:
        self._publisher, self.name = _publisher(vllm_config), name
        self.drafted = 0
        self.accepted = [0] * (drafts + 1)
        """Verifications by the number of drafts that they accepted."""

    def note(self, drafted: int, accepted: int) -> None:
        """`accepted` of `drafted` drafts of a request were accepted; called for every request of every step."""
        if drafted:
            self.drafted += drafted
            self.accepted[accepted] += 1

    @property
    def totals(self) -> np.ndarray:
        """[1, 3 + K] int64 as in `lookup.step`."""
        at_least = np.cumsum(self.accepted[::-1])[::-1]
        return np.array([[at_least[0], self.drafted, at_least[1:].sum(), *at_least[1:]]])

    def publish(self) -> None:
        """Hand the totals on; cheap, so after every step."""
        self._publisher.publish((self.name,), self.totals, None)


def _publisher(vllm_config: VllmConfig) -> Publisher:
    from vllm_ext.spec_metrics import Publisher

    rule = verifier(vllm_config)
    return Publisher(vllm_config, rule.name if rule else "standard")
