"""Look-up drafting under model runner V1: vLLM's `custom_class` proposer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_ext.spec_decode import active
from vllm_ext.spec_decode.tables import LookupDrafter

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Proposer:
    """Proposes rows of different lengths: none where nothing matches, fewer than K after a short match.

    vLLM gives no request ids to a proposer of this kind; `glue` passes them through `begin_step`.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        settings = active.lookup(vllm_config)
        self.limit = settings.drafts
        self.drafter = LookupDrafter(settings)
        self.drafter.compile()
        self.counters = active.SpecCounters(vllm_config)
        self._ids: list[str] = []
        self._verified: list[int] = []

    def load_model(self, target_model: Any) -> None:
        """Nothing to load."""

    def begin_step(self, runner: Any, scheduler_output: Any) -> None:
        """What the runner knows of this step's rows, before `propose`."""
        for request in scheduler_output.finished_req_ids:
            self.drafter.remove(request)
        self._ids = list(runner.input_batch.req_ids)
        drafted = scheduler_output.scheduled_spec_decode_tokens
        self._verified = [len(drafted.get(request, ())) for request in self._ids]
        self.limit = min(self.drafter.settings.drafts, scheduler_output.num_spec_tokens_to_schedule)
        for row, request in enumerate(self._ids):
            if not self.drafter.known(request):
                state = runner.requests[request]
                self.drafter.add(
                    request,
                    runner.input_batch.token_ids_cpu[row, : state.num_tokens],
                    state.num_prompt_tokens,
                    active.tenant(state.sampling_params),
                )

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts of each row; empty for rows that are still prompts."""
        count = len(sampled_token_ids)
        lengths = [int(n) if sampled else 0 for sampled, n in zip(sampled_token_ids, num_tokens_no_spec)]
        table = self.drafter.rows(self._ids[:count], range(count), lengths, self._verified[:count])
        drafts = np.zeros((len(table), self.drafter.settings.drafts), np.int64)
        matched = np.zeros(len(table), np.int32)
        self.drafter.step(table, token_ids_cpu, drafts, matched)
        self.counters.publish(self.drafter)
        return [drafts[r, : min(self.limit, 2 * int(matched[r]))].tolist() for r in range(count)]
