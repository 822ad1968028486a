"""The rank-one prior: identities of the reference. test_stages.py compares the kernel with it."""

from __future__ import annotations

import math

import pytest
import torch
from paged import DEVICE, Paged, make

from vllm_ext.kernels import reference
from vllm_ext.kernels.reference_residual import (
    Prior,
    explained,
    fold,
    make_prior,
    residual_attention,
)

PAGES, PAGE = 20, 16
OFF = -math.inf


def setup(seed: int = 0, queries: float = 1.0) -> tuple[Paged, torch.Tensor, Prior, torch.Tensor]:
    """A request of 20 pages and a bit, 2 KV heads, groups of 2; its pages, a prior over them, and a list."""
    p = make([PAGES * PAGE + 5], [2], 2, 2, 64, PAGE, seed=seed)
    p.k_cache.mul_(0.3)
    gen = torch.Generator().manual_seed(seed)
    mu = torch.randn(4, 64, generator=gen).to(DEVICE) * queries
    p.q.mul_(0.7).add_(mu)
    pages = p.block_table[0, : PAGES + 1].long()
    prior = make_prior(mu, p.k_cache, p.v_cache, pages, p.lens[0], p.scale)
    ids = torch.tensor([[0, 3, 9, 19, 20], [0, 1, 5, 19, 20]], dtype=torch.int32, device=DEVICE)
    return p, pages, prior, ids


def attend(p: Paged, pages, prior: Prior, ids, weight: float = 1.0, gate: float = OFF) -> torch.Tensor:
    return residual_attention(
        p.q, p.k_cache, p.v_cache, pages, ids, p.lens[0], p.scale, prior, weight, gate
    )  # fmt: skip


def exact(p: Paged, pages, ids=None) -> torch.Tensor:
    return reference.sparse_attention(p.q, p.k_cache, p.v_cache, pages, ids, p.lens[0], p.scale)[0]


def test_lambda_zero_is_the_host() -> None:
    p, pages, prior, ids = setup()
    assert torch.equal(attend(p, pages, prior, ids, weight=0.0), exact(p, pages, ids))


def test_every_page_listed_is_dense() -> None:
    p, pages, prior, _ = setup()
    every = torch.arange(PAGES + 1, dtype=torch.int32, device=DEVICE).expand(2, -1)
    assert torch.allclose(attend(p, pages, prior, every), exact(p, pages), atol=1e-5)


def test_the_mean_query_itself_is_dense() -> None:
    """q = mu: the prior of the keys that are not listed is exact, whatever the list."""
    p, pages, prior, ids = setup()
    p.q.copy_(prior.mu.expand(2, -1, -1))
    assert torch.allclose(attend(p, pages, prior, ids), exact(p, pages), atol=1e-4)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_safe_form_is_the_delta_form(weight: float) -> None:
    """O = O_est a + sum_I (b S_SA - a S) v, the form of the paper, with e^b inside a and lambda e^b for e^b."""
    p, pages, prior, ids = setup()
    got = attend(p, pages, prior, ids, weight)
    for t in range(2):
        for hq in range(4):
            h = hq // 2
            listed = ids[h][ids[h] < PAGES].long()
            known = p.k_cache[pages[listed], h].flatten(0, 1).double()
            values = p.v_cache[pages[listed], h].flatten(0, 1).double()
            last = p.k_cache[pages[PAGES], h, : 5 - 1 + t].double()  # token t sees 4 + t keys of the last page
            last_values = p.v_cache[pages[PAGES], h, : 5 - 1 + t].double()
            q, mu = p.q[t, hq].double(), prior.mu[hq].double()
            b = weight * ((q - mu) @ prior.mean_key[h].double() * p.scale).exp()
            z = prior.lse[hq].double().exp()
            old = (known @ mu * p.scale).exp()
            new = (torch.cat([known, last]) @ q * p.scale).exp()
            total = b * (z - old.sum()) + new.sum()
            alpha, beta = b * z / total, new.sum() / total
            out = alpha * prior.out[hq].double() - alpha * (old / z) @ values
            out = out + beta * (new / new.sum()) @ torch.cat([values, last_values])
            assert torch.allclose(got[t, hq].double(), out, atol=1e-4)


def test_shift_of_all_keys_changes_nothing() -> None:
    """Adding one vector to every key adds a constant to all logits of a query."""
    p, pages, prior, ids = setup()
    before = attend(p, pages, prior, ids)
    p.k_cache.add_(torch.randn(64, generator=torch.Generator().manual_seed(3)).to(DEVICE) * 0.5)
    moved = make_prior(prior.mu, p.k_cache, p.v_cache, pages, p.lens[0], p.scale)
    assert torch.allclose(attend(p, pages, moved, ids), before, atol=1e-4)


def test_folding_pages_one_by_one_is_the_whole_prior() -> None:
    p, pages, prior, _ = setup()
    part = make_prior(prior.mu, p.k_cache, p.v_cache, pages, 7 * PAGE + 3, p.scale)
    assert part.covered == 7
    for upto in (7, 8, 9, 9, 12, PAGES):
        part = fold(part, p.k_cache, p.v_cache, pages, upto, p.scale)
    for a, b in ((part.out, prior.out), (part.lse, prior.lse), (part.mean_key, prior.mean_key)):
        assert torch.allclose(a, b, atol=1e-5)


def test_prior_helps_when_queries_share_a_mean() -> None:
    """Mean error over seeds falls by more than a third (oracle lists, as in the paper's setting)."""
    plain, better = [], []
    for seed in range(12):
        p, pages, prior, _ = setup(seed)
        s = reference.page_scores(p.q, p.k_cache, None, pages, p.lens[0], p.scale, "exact", "softmax")
        ids = reference.select_pages(s, p.lens[0], 2, PAGE, 5, 1, 2)
        want = exact(p, pages)
        plain.append((exact(p, pages, ids) - want).norm() / want.norm())
        better.append((attend(p, pages, prior, ids) - want).norm() / want.norm())
    a, b = torch.stack(plain).mean().item(), torch.stack(better).mean().item()
    print(f"error {a:.3f} -> {b:.3f}")
    assert b < 0.66 * a


def test_gate() -> None:
    """A prior that explains nothing of the logits is dropped; what explains a share of them counts by that share."""
    p, pages, prior, ids = setup()
    assert not torch.allclose(attend(p, pages, prior, ids, gate=0.0), exact(p, pages, ids), atol=1e-3)
    wrong = make_prior(-3 * prior.mu, p.k_cache, p.v_cache, pages, p.lens[0], p.scale)
    assert torch.equal(attend(p, pages, wrong, ids, gate=0.0), exact(p, pages, ids))
    host, whole, trusted = exact(p, pages, ids), attend(p, pages, prior, ids), attend(p, pages, prior, ids, gate=0.0)
    share = ((trusted - host) * (whole - host)).sum(-1) / (whole - host).square().sum(-1)
    for h in range(2):
        keys = p.k_cache[pages[ids[h][ids[h] < PAGES].long()], h].flatten(0, 1)
        for hq in (2 * h, 2 * h + 1):
            want = explained(p.q[:, hq] @ keys.T, (prior.mu[hq] @ keys.T).expand(2, -1)).clamp(0, 1)
            assert torch.allclose(share[:, hq], want, atol=1e-3)
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(explained(x, x + 2), torch.ones(3))
    assert (explained(x, -x) < 0).all()
