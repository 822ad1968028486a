"""The verification rules of `kernels/spec_rules` as verifiers: kernels on a GPU, plain torch on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_ext.kernels.spec_rules import Rule

if TYPE_CHECKING:
    from vllm_ext.spec_decode.protocols import VerifyBatch


class RuleVerifier:
    """A `protocols.Verifier`.

    Args:
        rule: which rule, with its parameters.
    """

    needs_draft_law = False

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.lossless = rule.lossless

    def verify(self, batch: VerifyBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [R, K + 1] int64 and how many of them are emitted [R] int32; see `protocols.Verifier`."""
        if batch.logits.is_cuda:
            from vllm_ext.kernels.spec_verify import verify
        else:
            from vllm_ext.kernels.spec_reference import verify
        return verify(self.rule, batch)
