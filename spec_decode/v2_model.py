"""Drafters with a model under model runner V2: vLLM's speculator, with parallel drafting and look-ups added.

vLLM loads the draft model, gives it KV pages of its own and runs it over the verified tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CUDAGraphMode
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator
from vllm.v1.worker.gpu.spec_decode.utils import get_parallel_drafting_token_id

from vllm_ext.spec_decode import active
from vllm_ext.spec_decode.v2 import LookupRows


class ParallelSpeculator(StandaloneARSpeculator):
    """PARD: the tokens after the first come from one forward over K - 1 mask tokens (An et al., 2025, section 3).

    The verified tokens pass through the model first, as in sequential drafting; that forward gives the first draft. KV
    of mask tokens is overwritten by the next step's verified tokens.
    """

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.mask_token = get_parallel_drafting_token_id(self.draft_model_config.hf_config)
        masks = max(self.num_speculative_steps - 1, 1)
        self.ahead = torch.arange(1, masks + 1, device=device)
        self.columns = torch.arange(1, masks + 1, dtype=torch.int32, device=device).repeat(self.max_num_reqs)

    def _multi_step_decode(
        self,
        input_batch: Any,
        num_rejected: torch.Tensor,
        num_reqs: int,
        skip_attn: bool,
        num_tokens_across_dp: torch.Tensor | None,
    ) -> None:
        """Drafts 2 .. K in one forward."""
        masks = self.num_speculative_steps - 1
        tokens, buffers = num_reqs * masks, self.input_buffers
        if skip_attn:
            last = input_batch.positions[self._accepted_last_indices(input_batch, num_rejected, num_reqs)]
        else:
            last = self.expanded_positions[self.last_token_indices[:num_reqs]]
        positions = (last[:, None] + self.ahead).clamp_(max=self.max_model_len - 1).flatten()
        buffers.positions[:tokens].copy_(positions)
        buffers.input_ids[:tokens].fill_(self.mask_token)
        attention = slots = None
        if not skip_attn:
            buffers.query_start_loc[: num_reqs + 1].copy_(self.arange_gpu[: num_reqs + 1] * masks)
            buffers.seq_lens[:num_reqs].copy_((last + masks + 1).clamp(max=self.max_model_len))
            mapping = self.block_tables.compute_slot_mappings(
                input_batch.idx_mapping,
                buffers.query_start_loc[: num_reqs + 1],
                buffers.positions[:tokens],
                tokens,
            )
            slots = build_slot_mappings_by_layer(mapping, self.kv_cache_config)
            attention = self._build_uniform_attn_metadata(
                batch_desc=BatchExecutionDescriptor(
                    cg_mode=CUDAGraphMode.NONE, num_tokens=tokens, num_reqs=num_reqs, uniform_token_count=masks
                ),
                num_reqs=num_reqs,
                num_query_per_req=masks,
                seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound,
                step=masks + 1,
            )
        hidden = self._run_model(
            buffers.input_ids[:tokens], buffers.positions[:tokens], attention, slots, num_tokens_across_dp
        )
        drafts = self.sample_draft(
            hidden[:tokens],
            buffers.positions[:tokens],
            self.idx_mapping[:num_reqs].repeat_interleave(masks),
            self.temperature,
            self.seeds,
            self.columns[:tokens],
            self.draft_logits,
        )
        self.draft_tokens[:num_reqs, 1:] = drafts.view(num_reqs, masks)


_Base: Any = object


class _WithLookups(_Base):
    """A model drafter whose drafts give way to look-ups: those with a long match, or those with the better record.

    The model runs in every step, so that its KV has no holes; what it would have drafted at each verified token comes
    out of the same forward.
    """

    def __init__(self, vllm_config: Any, device: torch.device, req_states: Any) -> None:
        super().__init__(vllm_config, device)
        requests = vllm_config.scheduler_config.max_num_seqs
        settings = active.lookup(vllm_config)
        self.judges = bool(settings.hedge)
        self.offsets = torch.arange(settings.drafts + 1, device=device)
        self._hidden: Any = None
        self.rows = LookupRows(settings, device, req_states)
        self.counters = active.SpecCounters(vllm_config)
        self.found = torch.zeros(requests, settings.drafts, dtype=torch.int64, device=device)
        self.hits = torch.zeros(requests, dtype=torch.int32, device=device)

    @torch.inference_mode()
    def propose(self, input_batch: Any, *args: Any, dummy_run: bool = False, **kwargs: Any) -> torch.Tensor:
        """[R, K] int64: look-ups where they match well, the model's drafts elsewhere."""
        self._hidden = None
        drafts = super().propose(input_batch, *args, dummy_run=dummy_run, **kwargs)
        if dummy_run:
            return drafts
        count = input_batch.num_reqs
        found, hits = self.found[:count], self.hits[:count]
        num_sampled = args[4] if len(args) > 4 else kwargs["num_sampled"]
        judged = self._judge(num_sampled[:count]) if self.judges else None
        self.rows.propose(input_batch, num_sampled, found, hits, judged)
        self.counters.publish(self.rows.drafter)
        replaced = (hits > 0)[:, None]
        if self.draft_logits is not None:
            self._make_certain(input_batch.idx_mapping, found, replaced)
        drafts.copy_(torch.where(replaced, found, drafts))
        return drafts

    def _run_model(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = super()._run_model(*args, **kwargs)
        if self._hidden is None:  # the pass over the verified tokens comes first
            self._hidden = hidden
        return hidden

    def _judge(self, sampled: torch.Tensor) -> torch.Tensor:
        """[R, K + 1] int32: was each token just verified the model's best one there? -1 beyond them."""
        new = sampled.to(torch.int64)[:, None]
        last = self.last_token_indices[: len(sampled), None]
        rows = (last - new + self.offsets).clamp_(min=0)
        rows = torch.minimum(rows, last)
        best = self.compute_draft_logits(self._hidden[rows.flatten()], 0).argmax(-1)
        truth = self.expanded_input_ids[torch.minimum(rows + 1, last)]
        right = best.view_as(rows) == truth
        return torch.where(self.offsets < new, right.to(torch.int32), -1)

    def _make_certain(self, slots: torch.Tensor, found: torch.Tensor, replaced: torch.Tensor) -> None:
        """The law of a looked-up draft is certainty: its logits are 0 at the token and -inf elsewhere."""
        logits = self.draft_logits[slots]
        certain = torch.full_like(logits, float("-inf")).scatter_(2, found[:, :, None], 0.0)
        self.draft_logits[slots] = torch.where(replaced[:, :, None], certain, logits)


class HybridSpeculator(_WithLookups, StandaloneARSpeculator):
    """Sequential drafting and look-ups."""


class HybridParallelSpeculator(_WithLookups, ParallelSpeculator):
    """Parallel drafting and look-ups."""
