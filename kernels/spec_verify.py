"""Verification of draft tokens on the device: `spec_reference.emit` with the numbers of `spec_random.draws`.

Four launches, six for `hsd` with sampled drafts: statistics of every row, the decision of a request (all of its rows as
one tile), the race for the emitted token, the result. Nothing is read back and no shape depends on lengths.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.spec_random import FIRST_TOKEN, exponential, step_key
from vllm_ext.kernels.spec_rules import Rule

if TYPE_CHECKING:
    from vllm_ext.spec_decode.protocols import VerifyBatch

KINDS = {"ratio": 0, "hsd": 1, "cactus": 2, "fly": 3}
BLOCK = 4096
"""Vocabulary entries of one program."""


@triton.jit
def _row_stats(
    L, DL, DRAFT_ROW, ROW_REQUEST, CU, TEMP, DTEMP, PMAX, PARG, PSUM, PENT, PTOP, QMAX, QSUM, V, VD, l_row, d_row, NB,
    HAS_DRAFT: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of a block of one draft row: of the target, and of the draft law."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    r = tl.load(ROW_REQUEST + row)
    if row + 1 < tl.load(CU + r + 1):
        v = block * BLOCK + tl.arange(0, BLOCK)
        at = row * NB + block
        x = tl.load(L + row * l_row + v, mask=v < V, other=float("-inf")).to(tl.float32)
        peak = tl.max(x, 0)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        e = tl.exp(x - base)
        tl.store(PMAX + at, peak)
        tl.store(PARG + at, block * BLOCK + tl.argmax(x, 0))
        tl.store(PSUM + at, tl.sum(e, 0))
        if ENTROPY == 1:
            tl.store(PENT + at, tl.sum(tl.where(x == float("-inf"), 0.0, e * (x - base)), 0))
        if ENTROPY == 2:
            for i in tl.static_range(3):
                tl.store(PTOP + at * 4 + i, tl.max(x, 0))
                x = tl.where(v == block * BLOCK + tl.argmax(x, 0), float("-inf"), x)
            tl.store(PTOP + at * 4 + 3, float("-inf"))
        if HAS_DRAFT:
            source = tl.load(DRAFT_ROW + row).to(tl.int64)
            warm = tl.load(DTEMP + r)
            if (source >= 0) & (warm > 0) & (tl.load(TEMP + r) > 0):
                y = tl.load(DL + source * d_row + v, mask=v < VD, other=float("-inf")).to(tl.float32) / warm
                peak = tl.max(y, 0)
                tl.store(QMAX + at, peak)
                tl.store(QSUM + at, tl.sum(tl.exp(y - tl.where(peak == float("-inf"), 0.0, peak)), 0))


@triton.jit
def _log_sum(MAX, SUM, at, mask):
    """Log-sum-exp of every row of a tile of partial sums: [KP]."""
    top = tl.load(MAX + at, mask=mask, other=float("-inf"))
    peak = tl.max(top, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    return peak + tl.log(
        tl.maximum(tl.sum(tl.load(SUM + at, mask=mask, other=0.0) * tl.exp(top - peak[:, None]), 1), 1.2e-38)
    )


@triton.jit
def _shift(x, t, by: tl.constexpr):
    """x[t + by], 0 outside."""
    return tl.sum(tl.where(t[None, :] == t[:, None] + by, x[None, :], 0.0), 1)


@triton.jit
def _ratio(a, b):
    """min(1, a / b) without overflow, 0 where a = 0."""
    return tl.where(a >= b, (a > 0).to(tl.float32), a / tl.maximum(b, 1.2e-38))


@triton.jit
def _binary_kl(a, b):
    one = a * tl.log(tl.maximum(a, 1.2e-38) / tl.maximum(b, 1.2e-38))
    return one + (1.0 - a) * tl.log(tl.maximum(1.0 - a, 1.2e-38) / tl.maximum(1.0 - b, 1.2e-38))


@triton.jit
def _raised(px, delta, EXACT: tl.constexpr):
    """`spec_reference.raised`."""
    if EXACT:
        low = px
        high = tl.full(px.shape, 1.0, tl.float32)
        for _ in range(30):
            middle = (low + high) * 0.5
            inside = _binary_kl(middle, px) <= delta
            low = tl.where(inside, middle, low)
            high = tl.where(inside, high, middle)
        low = tl.where(-tl.log(tl.maximum(px, 1.2e-38)) <= delta, 1.0, tl.where(px > 0, low, 0.0))
    else:
        low = tl.minimum(px + tl.sqrt(2.0 * delta * px * tl.maximum(1.0 - px, 0.0)), 1.0)
    return low


@triton.jit
def _entropy(
    PMAX, PSUM, PENT, PTOP, row, base, live, NB, log_v, ENTROPY: tl.constexpr, KP: tl.constexpr, NBP: tl.constexpr
):
    """Entropy of every row of a request; `base` is the tile of partial sums."""
    if ENTROPY == 1:
        top = tl.load(PMAX + base, mask=live, other=float("-inf"))
        peak = tl.max(top, 1)
        shift = tl.where(top == float("-inf"), 0.0, top - peak[:, None])
        part = tl.load(PSUM + base, mask=live, other=0.0)
        weight = tl.where(top == float("-inf"), 0.0, tl.exp(shift))
        z = tl.maximum(tl.sum(weight * part, 1), 1.2e-38)
        mean = tl.sum(weight * (tl.load(PENT + base, mask=live, other=0.0) + shift * part), 1) / z
        h = (tl.log(z) - mean) / log_v
    else:
        c = tl.arange(0, 4 * NBP)
        known = tl.max(live.to(tl.int32), 1)[:, None] & (c < 4 * NB)[None, :]
        x = tl.load(PTOP + row[:, None] * (4 * NB) + c[None, :], mask=known != 0, other=float("-inf"))
        peak = tl.max(x, 1)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        z = tl.zeros([KP], tl.float32)
        s = tl.zeros([KP], tl.float32)
        for _ in tl.static_range(3):
            best = tl.max(x, 1)
            w = tl.exp(best - peak)
            z += w
            s += tl.where(best == float("-inf"), 0.0, w * (best - peak))
            x = tl.where(c[None, :] == tl.argmax(x, 1)[:, None], float("-inf"), x)
        z = tl.maximum(z, 1.2e-38)
        h = tl.log(z) - s / z
    return h


@triton.jit
def _judge(
    L, DL, DRAFTS, DRAFT_ROW, CU, TEMP, DTEMP, SEED, POSITION, PMAX, PARG, PSUM, PENT, PTOP, QMAX, QSUM, MASS, FACTS,
    STOP, WEIGHTS, l_row, d_row, NB, delta, theta, log_v,
    KIND: tl.constexpr, FIRST_PASS: tl.constexpr, EXACT: tl.constexpr, WINDOW: tl.constexpr, ENTROPY: tl.constexpr,
    HAS_DRAFT: tl.constexpr, KP: tl.constexpr, NBP: tl.constexpr,
):  # fmt: skip
    """Decide how many drafts of a request are kept, and what the next token is drawn from.

    STOP [R, 4] int64: tau, row, token without mass (-1), row of the draft law (-1). WEIGHTS [R, 3] fp32: log-sum-exp of
    the target and of the draft law at that row, scale of the target.
    """
    r = tl.program_id(0)
    start = tl.load(CU + r).to(tl.int64)
    own = tl.load(CU + r + 1) - start.to(tl.int32) - 1
    t = tl.arange(0, KP)
    row = start + t
    greedy = tl.load(TEMP + r) == 0
    warm = tl.load(DTEMP + r)
    x = tl.load(DRAFTS + row, mask=t < own, other=-1)
    if HAS_DRAFT:
        source = tl.load(DRAFT_ROW + row, mask=t < own, other=-1).to(tl.int64)
        source = tl.where(greedy | (warm <= 0), -1, source)
    else:
        source = tl.full([KP], -1, tl.int64)
    sampled = source >= 0
    n = tl.min(tl.where((x >= 0) | sampled, KP, t), 0)

    base = row[:, None] * NB + tl.arange(0, NBP)[None, :]
    live = (t < n)[:, None] & (tl.arange(0, NBP) < NB)[None, :]
    lse = _log_sum(PMAX, PSUM, base, live)
    block = tl.argmax(tl.load(PMAX + base, mask=live, other=float("-inf")), 1)
    best = tl.load(PARG + row * NB + block, mask=t < n, other=-2)
    known = (t < n) & (x >= 0)
    token = tl.maximum(x, 0)
    log_p = tl.load(L + row * l_row + token, mask=known, other=float("-inf")).to(tl.float32) - lse
    log_p = tl.where(greedy, tl.where(x == best, 0.0, float("-inf")), log_p)
    px = tl.exp(log_p)
    if HAS_DRAFT:
        lse_q = _log_sum(QMAX, QSUM, base, live & sampled[:, None])
        warm = tl.where(warm > 0, warm, 1.0)
        log_q = tl.load(DL + source * d_row + token, mask=known & sampled, other=0.0).to(tl.float32) / warm - lse_q
        log_q = tl.where(known & sampled, log_q, 0.0)
    else:
        lse_q = tl.zeros([KP], tl.float32)
        log_q = tl.zeros([KP], tl.float32)
    qx = tl.exp(log_q)

    key = step_key(tl.load(SEED + r), tl.load(POSITION + start))
    u = tl.rand(key, t)
    scale = tl.full([KP], 1.0, tl.float32)
    if KIND == 1:
        walk = tl.cumsum(tl.where(t < n, log_p - log_q, 0.0), 0)
        highest = tl.max(tl.where(t[None, :] <= t[:, None], walk[None, :], 0.0), 1)
        after = tl.exp(walk - tl.maximum(highest, 0.0))
        scale = _shift(after, t, -1) + (t == 0).to(tl.float32)
        if HAS_DRAFT and FIRST_PASS:
            tl.store(FACTS + row * 3, lse, mask=t < n)
            tl.store(FACTS + row * 3 + 1, lse_q, mask=t < n)
            tl.store(FACTS + row * 3 + 2, scale, mask=t < n)
            tau = n
        else:
            mass = scale * (1.0 - px)
            if HAS_DRAFT:
                mass = tl.where(sampled, tl.sum(tl.load(MASS + base, mask=live & sampled[:, None], other=0.0), 1), mass)
            following = _shift(mass, t, 1)
            rest = following + 1.0 - after
            h = tl.where(rest > 0, following / tl.maximum(rest, 1.2e-38), 1.0)
            h = tl.where(t == n - 1, after, h)
            tau = tl.max(tl.where((u < h) & (t < n), t + 1, 0), 0)
    else:
        if KIND == 0:
            kept = u < _ratio(px, qx)
        elif KIND == 2:
            gamma = _raised(px, delta, EXACT)
            scale = tl.where(px < 1, (1.0 - gamma) / tl.maximum(1.0 - px, 1.2e-38), 1.0)
            kept = u < _ratio(gamma, qx)
        else:
            match = (u < px) & (t < n)
            h = _entropy(PMAX, PSUM, PENT, PTOP, row, base, live, NB, log_v, ENTROPY, KP, NBP)
            reach = WINDOW - (1 if (ENTROPY == 2 and WINDOW > 0) else 0)
            inside = (t[None, :] > t[:, None]) & (t[None, :] <= t[:, None] + reach)
            broken = tl.sum((inside & (match[None, :] == 0)).to(tl.int32), 1)
            kept = match | ((broken == 0) & (t + WINDOW < n) & (h >= theta))
        tau = tl.min(tl.where(kept & (t < n), KP, t), 0)

    here = (t == tau) & (tau < n)
    without = here & (x >= 0)
    if KIND == 1:
        without = without & (sampled == 0)
    tl.store(STOP + r * 4, tau.to(tl.int64))
    tl.store(STOP + r * 4 + 1, start + tau)
    tl.store(STOP + r * 4 + 2, tl.max(tl.where(without, x, -1), 0))
    tl.store(STOP + r * 4 + 3, tl.max(tl.where(here, source, -1), 0))
    tl.store(WEIGHTS + r * 3, tl.sum(tl.where(here, lse, 0.0), 0))
    tl.store(WEIGHTS + r * 3 + 1, tl.sum(tl.where(here, lse_q, 0.0), 0))
    tl.store(WEIGHTS + r * 3 + 2, tl.sum(tl.where(here, scale, 0.0), 0))


@triton.jit
def _surplus(L, DL, DRAFT_ROW, ROW_REQUEST, CU, TEMP, DTEMP, FACTS, MASS, V, VD, l_row, d_row, NB, BLOCK: tl.constexpr):
    """`sum_v [R p(v) - q(v)]+` of a block of every sampled draft row but a request's first."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    r = tl.load(ROW_REQUEST + row)
    source = tl.load(DRAFT_ROW + row).to(tl.int64)
    warm = tl.load(DTEMP + r)
    inner = (row > tl.load(CU + r)) & (row + 1 < tl.load(CU + r + 1))
    if inner & (source >= 0) & (warm > 0) & (tl.load(TEMP + r) > 0):
        v = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(L + row * l_row + v, mask=v < V, other=float("-inf")).to(tl.float32)
        y = tl.load(DL + source * d_row + v, mask=v < VD, other=float("-inf")).to(tl.float32) / warm
        p = tl.exp(x - tl.load(FACTS + row * 3)) * tl.load(FACTS + row * 3 + 2)
        q = tl.exp(y - tl.load(FACTS + row * 3 + 1))
        tl.store(MASS + row * NB + block, tl.sum(tl.maximum(p - q, 0.0), 0))


@triton.jit
def _race(
    L, DL, CU, TEMP, DTEMP, SEED, POSITION, STOP, WEIGHTS, BEST, WINNER, V, VD, l_row, d_row, NB, FIRST: tl.constexpr,
    HAS_DRAFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best candidate of a block for the emitted token: argmax of log weight - log noise, or of the logits."""
    r = tl.program_id(0)
    block = tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(STOP + r * 4 + 1)
    x = tl.load(L + row * l_row + v, mask=v < V, other=float("-inf")).to(tl.float32)
    if HAS_DRAFT:
        source = tl.load(STOP + r * 4 + 3)
        if source >= 0:
            y = tl.load(DL + source * d_row + v, mask=v < VD, other=float("-inf")).to(tl.float32) / tl.load(DTEMP + r)
            log_p = x - tl.load(WEIGHTS + r * 3)
            left = tl.load(WEIGHTS + r * 3 + 2) * tl.exp(log_p) - tl.exp(y - tl.load(WEIGHTS + r * 3 + 1))
            # where p = q up to rounding nothing is left anywhere, and p decides
            x = tl.where(left > 0, tl.log(tl.maximum(left, 1.2e-38)), log_p - 88.0)
    if tl.load(TEMP + r) > 0:
        key = step_key(tl.load(SEED + r), tl.load(POSITION + tl.load(CU + r)))
        x = x - tl.log(exponential(tl.rand(key, FIRST + v)))
    x = tl.where((v == tl.load(STOP + r * 4 + 2)) | (v >= V), float("-inf"), x)
    tl.store(BEST + r * NB + block, tl.max(x, 0))
    tl.store(WINNER + r * NB + block, block * BLOCK + tl.argmax(x, 0))


@triton.jit
def _result(DRAFTS, CU, STOP, BEST, WINNER, OUT, COUNT, K, NB, KP: tl.constexpr, NBP: tl.constexpr):
    r = tl.program_id(0)
    t = tl.arange(0, KP)
    b = tl.arange(0, NBP)
    tau = tl.load(STOP + r * 4).to(tl.int32)
    block = tl.argmax(tl.load(BEST + r * NB + b, mask=b < NB, other=float("-inf")), 0)
    token = tl.load(WINNER + r * NB + block).to(tl.int64)
    kept = tl.load(DRAFTS + tl.load(CU + r) + t, mask=t < tau, other=-1)
    tl.store(OUT + r * (K + 1) + t, tl.where(t == tau, token, kept), mask=t <= K)
    tl.store(COUNT + r, tau + 1)


class _Step:
    """Buffers and launches of one verification step."""

    def __init__(self, rule: Rule, batch: VerifyBatch) -> None:
        given = None if rule.kind == "fly" else batch.draft_logits
        self.rule, self.batch, self.sampled = rule, batch, given is not None
        self.draft = batch.logits if given is None else given
        self.draft_row = batch.drafts if given is None else batch.draft_row
        self.requests, (self.rows, vocab) = batch.cu_rows.shape[0] - 1, batch.logits.shape
        self.blocks = triton.cdiv(vocab, BLOCK)
        # a padded target vocabulary is wider than the draft's
        self.vocab = (vocab, min(vocab, self.draft.shape[1]))
        self.width = (batch.logits.stride(0), self.draft.stride(0), self.blocks)
        self.laws = (batch.cu_rows, batch.temperature, batch.draft_temperature)
        self.entropy = {"normalized": 1, "top3": 2}[rule.entropy] if rule.kind == "fly" else 0
        new = batch.logits.new_empty
        p_max, p_sum, p_ent, q_max, q_sum, self.mass = new(6, self.rows, self.blocks, dtype=torch.float32)
        p_arg = new(self.rows, self.blocks, dtype=torch.int64)
        p_top = new((self.rows, self.blocks, 4) if self.entropy == 2 else (1,), dtype=torch.float32)
        self.stats = (p_max, p_arg, p_sum, p_ent, p_top, q_max, q_sum)
        self.facts = new(self.rows, 3, dtype=torch.float32)
        self.stop = new(self.requests, 4, dtype=torch.int64)
        self.weights = new(self.requests, 3, dtype=torch.float32)
        tile = max(2, triton.next_power_of_2(batch.max_drafts + 1)), max(2, triton.next_power_of_2(self.blocks))
        self.tile: dict[str, Any] = {"KP": tile[0], "NBP": tile[1]}
        self.warps = 4 if tile[0] * tile[1] <= 1024 else 8 if tile[0] * tile[1] <= 2048 else 16

    def summarize(self) -> None:
        """Statistics of every draft row."""
        _row_stats[(self.rows, self.blocks)](
            self.batch.logits, self.draft, self.draft_row, self.batch.row_request, *self.laws, *self.stats, *self.vocab,
            *self.width, HAS_DRAFT=self.sampled, ENTROPY=self.entropy, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip

    def judge(self, first: bool = False) -> None:
        """How many drafts each request keeps; `first`: only what `surplus` needs."""
        b, rule = self.batch, self.rule
        _judge[(self.requests,)](
            b.logits, self.draft, b.drafts, self.draft_row, *self.laws, b.seeds, b.positions, *self.stats, self.mass,
            self.facts, self.stop, self.weights, *self.width, rule.delta, rule.theta, math.log(max(self.vocab[0], 2)),
            KIND=KINDS[rule.kind], FIRST_PASS=first, EXACT=rule.exact and rule.delta > 0, WINDOW=rule.window,
            ENTROPY=self.entropy, HAS_DRAFT=self.sampled, **self.tile, num_warps=self.warps,
        )  # fmt: skip

    def surplus(self) -> None:
        """The mass that the capped target has above the draft law, for `hsd`."""
        _surplus[(self.rows, self.blocks)](
            self.batch.logits, self.draft, self.draft_row, self.batch.row_request, *self.laws, self.facts, self.mass,
            *self.vocab, *self.width, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip

    def emit(self) -> tuple[Tensor, Tensor]:
        """Draw the next token of every request, and put the result together."""
        b, new = self.batch, self.batch.logits.new_empty
        best = new(self.requests, self.blocks, dtype=torch.float32)
        winner = new(self.requests, self.blocks, dtype=torch.int64)
        _race[(self.requests, self.blocks)](
            b.logits, self.draft, *self.laws, b.seeds, b.positions, self.stop, self.weights, best, winner, *self.vocab,
            *self.width, FIRST=FIRST_TOKEN, HAS_DRAFT=self.sampled, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        out, count = new(self.requests, b.max_drafts + 1, dtype=torch.int64), new(self.requests, dtype=torch.int32)
        _result[(self.requests,)](
            b.drafts,
            b.cu_rows,
            self.stop,
            best,
            winner,
            out,
            count,
            b.max_drafts,
            self.blocks,
            **self.tile,
            num_warps=1,
        )
        return out, count


def verify(rule: Rule, batch: VerifyBatch) -> tuple[Tensor, Tensor]:
    """Tokens [R, K+1] int64 (-1 beyond) and their number [R] int32; see `spec_reference.emit`.

    K is below FIRST_TOKEN. Rows of logits and of draft logits are contiguous.
    """
    step = _Step(rule, batch)
    step.summarize()
    if step.sampled and rule.kind == "hsd":
        step.judge(first=True)
        step.surplus()
    step.judge()
    return step.emit()
