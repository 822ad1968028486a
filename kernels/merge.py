"""K5: merge partial attention results over disjoint key sets. Specification: `reference.merge`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _merge(PO, PL, OUT, LSE, rows, S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    rd = tl.arange(0, DP)
    top = float("-inf")
    for s in range(S):
        top = tl.maximum(top, tl.load(PL + s * rows + row))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    acc = tl.zeros([DP], tl.float32)
    for s in range(S):
        weight = tl.exp(tl.load(PL + s * rows + row) - top)
        part = tl.load(PO + (s * rows + row) * D + rd, mask=rd < D, other=0.0).to(tl.float32)
        acc += weight * part
        total += weight
    safe = tl.where(total > 0, total, 1.0)
    tl.store(OUT + row * D + rd, (acc / safe).to(OUT.dtype.element_ty), mask=rd < D)
    tl.store(LSE + row, tl.where(total > 0, top + tl.log(safe), float("-inf")))


def merge(outputs: Tensor, lses: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge S partials in their order: outputs [S, T, Hq, D] contiguous, lses [S, T, Hq] fp32.

    Returns:
        (out [T, Hq, D], LSE [T, Hq] fp32); `out` is allocated in the dtype of `outputs` unless given.
    """
    s, t, hq, d = outputs.shape
    out = torch.empty(t, hq, d, dtype=outputs.dtype, device=outputs.device) if out is None else out
    lse = torch.empty(t, hq, dtype=torch.float32, device=outputs.device)
    _merge[(t * hq,)](outputs, lses, out, lse, t * hq, S=s, D=d, DP=triton.next_power_of_2(d), num_warps=1)
    return out, lse
