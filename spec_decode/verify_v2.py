"""A verification rule under model runner V2: vLLM's rejection sampler with another decision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_ext.spec_decode.method import VerifierMethod
from vllm_ext.spec_decode.protocols import VerifyBatch


class RuleSampler(RejectionSampler):
    """Grammar, penalties, logits processors, logprobs and chunking are vLLM's; only who is accepted is the rule's."""

    def __init__(self, method: VerifierMethod, sampler: Any, spec_config: Any, device: Any, **kwargs: Any) -> None:
        super().__init__(sampler, spec_config, device, **kwargs)
        self.rule = method.verifier(sampler.req_states.vocab_size, device)

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        processed = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        states = self.sampler.sampling_states
        temperature = states.temperature.gpu[idx_mapping]
        drafts = successors(verify_draft_sampled, cu_num_logits)
        rows = None
        if draft_logits is not None:
            # a draft that the grammar forbids was still drawn: it must be answered from the residual of its law
            drawn = successors(draft_sampled, cu_num_logits) >= 0
            rows = torch.where(drawn, expanded_idx_mapping * draft_logits.shape[1] + expanded_local_pos, -1)
            draft_logits = draft_logits.flatten(0, 1)
        tokens, count = self.rule.verify(
            VerifyBatch(
                logits=processed,
                drafts=drafts,
                cu_rows=cu_num_logits,
                row_request=owners(cu_num_logits, drafts.shape[0]),
                temperature=temperature,
                seeds=states.seeds.gpu[idx_mapping],
                positions=pos,
                draft_logits=draft_logits,
                draft_row=rows,
                draft_temperature=temperature,
                max_drafts=self.num_speculative_steps,
            )
        )
        return processed, tokens, count


def successors(tokens: torch.Tensor, cu_rows: torch.Tensor) -> torch.Tensor:
    """[T] int64: the token of the next row, -1 in the last row of a request. `tokens` [T], `cu_rows` [R + 1]."""
    following = tokens.roll(-1).to(torch.int64)
    return following.index_fill(0, cu_rows[1:].to(torch.int64) - 1, -1)


def owners(cu_rows: torch.Tensor, rows: int) -> torch.Tensor:
    """[T] int32: which request a row belongs to."""
    positions = torch.arange(rows, device=cu_rows.device, dtype=cu_rows.dtype)
    return torch.searchsorted(cu_rows[1:].contiguous(), positions, right=True).to(torch.int32)
