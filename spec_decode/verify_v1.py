"""A verification rule under model runner V1: vLLM's rejection sampler with another decision."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample import rejection_sampler as stock

from vllm_ext.spec_decode.method import VerifierMethod
from vllm_ext.spec_decode.protocols import Verifier, VerifyBatch


class RuleSampler(stock.RejectionSampler):
    """Penalties, grammar, logprobs and the bonus token are vLLM's; only who is accepted is the rule's."""

    def __init__(self, method: VerifierMethod, sampler: Any, spec_config: Any, device: Any) -> None:
        super().__init__(sampler, spec_config, device)
        self._method, self._device = method, device
        self._rule: Verifier | None = None
        if not hasattr(stock.rejection_sample, "vllm_ext"):
            stock.rejection_sample = _by_rule(stock.rejection_sample)

    def forward(self, metadata: Any, draft_probs: Any, logits: torch.Tensor, sampling_metadata: Any) -> Any:
        """As vLLM's; the rule that decides is handed to `rejection_sample` with the metadata."""
        if self._rule is None:
            self._rule = self._method.verifier(logits.shape[-1], self._device)
        sampling_metadata.vllm_ext_rule = self._rule
        return super().forward(metadata, draft_probs, logits, sampling_metadata)


def _by_rule(original: Any) -> Any:
    """vLLM's `rejection_sample`, for calls whose metadata carry a rule another one."""

    def rejection_sample(
        drafts: torch.Tensor,
        num_drafts: list[int],
        max_drafts: int,
        cu_drafts: torch.Tensor,
        draft_probs: torch.Tensor | None,
        target_logits: torch.Tensor,
        bonus: torch.Tensor,
        sampling: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        rule = getattr(sampling, "vllm_ext_rule", None)
        if rule is None:
            return original(
                drafts, num_drafts, max_drafts, cu_drafts, draft_probs, target_logits, bonus, sampling, **kwargs
            )
        batch = verify_batch(drafts, num_drafts, max_drafts, draft_probs, target_logits, bonus, sampling)
        tokens, count = rule.verify(batch)
        used = torch.arange(tokens.shape[1], device=tokens.device) < count[:, None]
        return torch.where(used, tokens, stock.PLACEHOLDER_TOKEN_ID).to(torch.int32)

    rejection_sample.vllm_ext = True  # type: ignore[attr-defined]
    return rejection_sample


def verify_batch(
    drafts: torch.Tensor,
    num_drafts: list[int],
    max_drafts: int,
    draft_probs: torch.Tensor | None,
    target_logits: torch.Tensor,
    bonus: torch.Tensor,
    sampling: Any,
) -> VerifyBatch:
    """vLLM's flat draft rows [sum K, V] with a bonus row put behind each request's.

    The bonus token is drawn already, by vLLM's sampler: its row is the law that has only this token.
    """
    device, requests = target_logits.device, len(num_drafts)
    lengths = torch.tensor(num_drafts, dtype=torch.int64)
    cu = torch.zeros(requests + 1, dtype=torch.int32)
    cu[1:] = (lengths + 1).cumsum(0)
    owner = torch.repeat_interleave(torch.arange(requests), lengths + 1)
    last = (cu[1:] - 1).long()
    row_of_draft = torch.ones(len(owner), dtype=torch.bool).index_fill(0, last, False).nonzero()[:, 0]
    last, row_of_draft = last.to(device), row_of_draft.to(device)
    logits = torch.full((len(owner), target_logits.shape[1]), float("-inf"), device=device)
    logits[row_of_draft] = target_logits
    logits[last, bonus[:, 0].long()] = 0.0
    flat = torch.full((len(owner),), -1, dtype=torch.int64, device=device)
    flat[row_of_draft] = drafts.long()
    rows = None
    if draft_probs is not None:
        rows = torch.full_like(flat, -1)
        rows[row_of_draft] = torch.arange(len(drafts), device=device)
    temperature = sampling.temperature
    if temperature is None or sampling.all_greedy:
        temperature = torch.zeros(requests, device=device)
    seeds = torch.randint(2**62, (requests,), device=device)
    for request, generator in sampling.generators.items():
        seeds[request] = torch.randint(2**62, (1,), generator=generator, device=device)
    return VerifyBatch(
        logits=logits,
        drafts=flat,
        cu_rows=cu.to(device),
        row_request=owner.to(torch.int32).to(device),
        temperature=temperature.float(),
        seeds=seeds,
        positions=torch.arange(len(owner), device=device) - cu.to(device)[owner.to(device)],
        draft_logits=None if draft_probs is None else draft_probs.log(),
        draft_row=rows,
        draft_temperature=(temperature > 0).float(),
        max_drafts=max_drafts,
    )
