"""Draft lengths, tenants and counts in vLLM's scheduler (`--scheduler-cls`), synchronous or asynchronous."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_ext.spec_decode import active
from vllm_ext.spec_decode.history import AcceptanceHistory
from vllm_ext.spec_decode.protocols import LengthInput

_Base: Any = object


class _Speculation(_Base):
    """Asks the length policy once a step: one draft count for the whole batch, or one for each request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config
        method, drafter = active.length(config), active.drafter(config)
        self.spec_counters = None
        if drafter is not None and drafter.counted_by_scheduler:
            self.spec_counters = active.DraftCounters(config, drafter.name, self.num_spec_tokens)
        if method is None or not self.num_spec_tokens:
            return
        self.spec_policy = method.policy(config)
        self.spec_uniform = method.uniform
        self.spec_lengths: dict[str, int] = {}
        self.spec_choices = method.choices(self.num_spec_tokens)
        self.spec_history = AcceptanceHistory(self.num_spec_tokens)
        self.spec_outcomes: list[tuple[int, int]] = []
        self.spec_clock = time.perf_counter()
        self.dynamic_sd_lookup = self  # asked `[batch size]` once a step

    def __getitem__(self, batch_size: int) -> int:
        """Drafts that this step makes for each of its requests; where counts differ, the most of them."""
        running = [r for r in self.running if not r.is_prefill_chunk]
        if not running:
            return self.spec_choices[-1]
        known = LengthInput(
            survival=self.spec_history.survival([r.request_id for r in running]),
            context=np.fromiter((r.num_computed_tokens for r in running), np.int64, len(running)),
            choices=self.spec_choices,
            uniform=self.spec_uniform,
        )
        lengths = self.spec_policy.choose(known)
        if not self.spec_uniform:
            self.spec_lengths = {r.request_id: int(n) for r, n in zip(running, lengths)}
        return min(n for n in self.spec_choices if n >= lengths.max())

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; of the drafts that the last step made, each request keeps as many as were chosen for it."""
        lengths: dict[str, int] = getattr(self, "spec_lengths", {})
        for request in self.running if lengths else ():
            keep = lengths.get(request.request_id)
            if keep is not None and len(request.spec_token_ids) > keep:
                request.spec_token_ids = request.spec_token_ids[:keep]
        return super().schedule(*args, **kwargs)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: Any,
        request_id: str,
    ) -> Any:
        """As vLLM's; notes what became of a request's drafts."""
        if hasattr(self, "spec_history"):
            self.spec_history.note(request_id, num_draft_tokens, num_accepted_tokens)
            self.spec_outcomes.append((num_draft_tokens, num_accepted_tokens))
        if self.spec_counters is not None:
            self.spec_counters.note(num_draft_tokens, num_accepted_tokens)
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens=num_draft_tokens,
            num_accepted_tokens=num_accepted_tokens,
            num_invalid_spec_tokens=num_invalid_spec_tokens,
            request_id=request_id,
        )

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; reports the step to the policy, and the counts to the metrics."""
        result = super().update_from_output(*args, **kwargs)
        if self.spec_counters is not None:
            self.spec_counters.publish()
        if hasattr(self, "spec_history"):
            now = time.perf_counter()
            drafted, accepted = np.array(self.spec_outcomes or [(0, 0)], np.int64).T
            self.spec_policy.observe(drafted, accepted, now - self.spec_clock)
            self.spec_clock, self.spec_outcomes = now, []
            self.spec_history.keep(self.requests)
        return result

    def add_request(self, request: Any) -> None:
        """As vLLM's; the request's cache salt becomes the tenant that the drafters see."""
        parameters = request.sampling_params
        if parameters is not None and request.cache_salt is not None:
            parameters.extra_args = {**(parameters.extra_args or {}), active.TENANT: request.cache_salt}
        super().add_request(request)


class SpeculationScheduler(_Speculation, Scheduler):
    """For synchronous scheduling; made in its place, `AsyncSpeculationScheduler` where scheduling is asynchronous."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is SpeculationScheduler and vllm_config.scheduler_config.async_scheduling:
            return AsyncSpeculationScheduler(vllm_config, *args, **kwargs)
        return super().__new__(cls)


class AsyncSpeculationScheduler(_Speculation, AsyncScheduler):
    """For asynchronous scheduling: what is chosen in a step holds for the drafts that the step makes."""
