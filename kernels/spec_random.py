"""Counter-based random numbers of verification: a function of (seed, position, index) alone.

A step draws from the key of its request's *first* row. Keys by row would repeat: a step that stops early hands its
later positions to the next step, and a backward rule has looked at their numbers already.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FIRST_TOKEN = 1024
"""Indices below it are the acceptance uniforms of a step, those from it on the token noise."""


@triton.jit
def step_key(seed, position):
    """64-bit key of a request's step."""
    a, b, _, _ = tl.randint4x(seed, position)
    return (a.to(tl.uint64) << 32) | b.to(tl.uint64)


@triton.jit
def exponential(u):
    """Exp(1) from a uniform in [0, 1), precise near 0, where races are decided."""
    u = tl.maximum(u, 1.1641532e-10)
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * 0.25)))
    return tl.where(u < 0.02, series, -tl.log(1.0 - u))


@triton.jit
def _draws(SEED, POSITION, U, NOISE, K, V, u_row, n_row, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = step_key(tl.load(SEED + r), tl.load(POSITION + r))
    tl.store(U + r * u_row + i, tl.rand(key, i), mask=i < K)
    tl.store(NOISE + r * n_row + i, exponential(tl.rand(key, FIRST + i)), mask=i < V)


def draws(seeds: Tensor, positions: Tensor, k: int, v: int) -> tuple[Tensor, Tensor]:
    """The numbers that `spec_verify` uses for steps with these keys: uniforms [R, K] and Exp(1) noise [R, V], fp32.

    Args:
        seeds, positions: [R] int64; the position of a request's first row.
    """
    u = torch.empty(len(seeds), k, device=seeds.device)
    noise = torch.empty(len(seeds), v, device=seeds.device)
    grid = (len(seeds), triton.cdiv(max(k, v), 1024))
    _draws[grid](seeds, positions, u, noise, k, v, u.stride(0), noise.stride(0), FIRST=FIRST_TOKEN, BLOCK=1024)
    return u, noise
