"""HedgeSpec's arithmetic: weights, delayed rounds, regret on synthetic streams, and what the estimate estimates."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vllm_ext.spec_decode import normal_hedge as hedge


class Slot:
    """The state of one request."""

    def __init__(self, n: int, k: int, cost: list[float] | None = None) -> None:
        self.n, self.k = n, k
        floats, ints = hedge.state_size(n, k)
        self.floats, self.ints = np.full(floats, np.nan), np.full(ints, -1, dtype=np.int64)
        self.cost = np.asarray(cost or [1.0] * n)
        hedge.reset(self.floats, self.ints, n)

    def push(self, g: np.ndarray) -> None:
        hedge.push(np.asarray(g, dtype=np.float64), self.cost, self.floats, self.ints, self.n, self.k)

    @property
    def regret(self) -> np.ndarray:
        return self.floats[: self.n]

    @property
    def weights(self) -> np.ndarray:
        return self.floats[self.n : 2 * self.n]


def lengths(g: np.ndarray, k: int) -> np.ndarray:
    """`1 + expected accepted` of a draft of k from every token whose horizon is covered: [T - k + 1, N]."""
    return np.stack([1 + np.cumprod(g[t : t + k], axis=0).sum(0) for t in range(len(g) - k + 1)])


def test_weights_solve_the_equation() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 20):
        regret, out = rng.normal(size=n) * 5, np.empty(n)
        regret[0] = 3.0
        hedge.weights(regret, out)
        assert out.sum() == pytest.approx(1)
        assert (out[regret <= 0] == 0).all()
        c = _scale(regret)
        want = np.maximum(regret, 0) / c * np.exp(np.maximum(regret, 0) ** 2 / (2 * c))
        assert out == pytest.approx(want / want.sum(), rel=1e-6)


def _scale(regret: np.ndarray) -> float:
    """The root by plain bisection over a wide range."""
    low, high = 1e-6, 1e6
    for _ in range(300):
        c = math.sqrt(low * high)
        with np.errstate(over="ignore"):
            mean = np.exp(np.maximum(regret, 0) ** 2 / (2 * c)).mean()
        low, high = (c, high) if mean > math.e else (low, c)
    return c


def test_weights_are_uniform_without_a_leader() -> None:
    out = np.empty(3)
    hedge.weights(np.array([-1.0, 0.0, -0.1]), out)
    assert out == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_delayed_rounds_equal_the_whole_sequence(k: int) -> None:
    """Losses settle when their horizon is covered, with the weights of their opening."""
    rng = np.random.default_rng(k)
    g = rng.random((40, 3))
    slot, played = Slot(3, k), []
    for row in g:
        played.append(slot.weights.copy())
        slot.push(row)
    loss = 1 - lengths(g, k) / (k + 1)
    want = sum(played[t] @ f - f for t, f in enumerate(loss))
    assert slot.regret == pytest.approx(want)
    assert slot.ints[1] == len(loss)


def test_a_new_request_starts_over() -> None:
    slot = Slot(2, 3)
    for _ in range(10):
        slot.push(np.array([1.0, 0.0]))
    assert slot.weights[0] == pytest.approx(1)
    hedge.reset(slot.floats, slot.ints, 2)
    assert slot.weights == pytest.approx([0.5, 0.5])
    assert slot.ints.tolist() == [0, 0]


def played_loss(g: np.ndarray, k: int) -> tuple[float, np.ndarray]:
    """Summed loss of the weights, and of every fixed drafter, over a stream [T, N]."""
    slot, total = Slot(g.shape[1], k), 0.0
    loss = 1 - lengths(g, k) / (k + 1)
    for t, row in enumerate(g):
        if t < len(loss):
            total += slot.weights @ loss[t]
        slot.push(row)
    return total, loss.sum(0)


@pytest.mark.parametrize("kind", ["independent", "switching", "adversarial"])
def test_regret_is_sublinear(kind: str) -> None:
    """Regret a round falls at least as fast as the bound's square root, and stays below it."""
    rng, k, n = np.random.default_rng(1), 4, 7
    per_round = []
    for steps in (125, 500, 2000):
        rates = np.linspace(0.3, 0.6, n)
        g = (rng.random((steps, n)) < rates).astype(float)
        if kind == "switching":
            g = np.where((np.arange(steps) // 50 % 2 == 0)[:, None], g, g[:, ::-1])
        elif kind == "adversarial":
            g = np.tile((np.arange(n) % 2 == 0).astype(float), (steps, 1))
            g[1::2] = 1 - g[1::2]
        total, fixed = played_loss(g, k)
        per_round.append((total - fixed.min()) / steps)
        assert per_round[-1] <= math.sqrt((k + 1) ** 3 * math.log(n) / steps)
    assert per_round[2] < 0.6 * max(per_round[0], 1e-3)


def test_the_best_drafter_leads_after_64_tokens() -> None:
    """Tokens a round from token 64 on, against the best fixed drafter's: at most 5 % fewer."""
    rng, k = np.random.default_rng(2), 8
    ratios = []
    for _ in range(12):
        g = (rng.random((300, 3)) < rng.permutation([0.85, 0.5, 0.2])).astype(float)
        slot, mine = Slot(3, k), []
        value = lengths(g, k)
        for t, row in enumerate(g):
            if 64 <= t < len(value):
                mine.append(value[t, hedge.leader(slot.floats, 3)])
            slot.push(row)
        ratios.append(np.mean(mine) / value[64:].mean(0).max())
    assert np.mean(ratios) > 0.98
    assert min(ratios) > 0.95


def exp3_loss(loss: np.ndarray, rng: np.random.Generator) -> float:
    """Summed loss of EXP3, which sees the loss of the drafter that it played alone."""
    steps, n = loss.shape
    rate, total, gain = min(1.0, math.sqrt(n * math.log(n) / ((math.e - 1) * steps))), 0.0, np.zeros(n)
    for f in loss:
        weights = np.exp(rate / n * (gain - gain.max()))
        chance = (1 - rate) * weights / weights.sum() + rate / n
        total += chance @ f
        played = rng.choice(n, p=chance)
        gain[played] += (1 - f[played]) / chance[played]
    return total


def test_scoring_all_drafters_beats_a_bandit() -> None:
    """Seven drafters, 1,000 tokens: at most half of the regret of EXP3."""
    rng, k = np.random.default_rng(5), 4
    mine = bandit = 0.0
    for _ in range(5):
        g = (rng.random((1000, 7)) < rng.permutation(np.linspace(0.2, 0.8, 7))).astype(float)
        total, fixed = played_loss(g, k)
        mine += total - fixed.min()
        bandit += exp3_loss(1 - lengths(g, k) / (k + 1), rng) - fixed.min()
    assert 0 < mine < 0.5 * bandit


def successors(words: list[int], order: int) -> np.ndarray:
    """1 where a word is the one that followed the last occurrence of the `order` words before it: [T]."""
    last: dict[tuple[int, ...], int] = {}
    hits = np.zeros(len(words))
    for t in range(order, len(words)):
        context = tuple(words[t - order : t])
        hits[t] = last.get(context) == words[t]
        last[context] = words[t]
    return hits


def test_regret_on_recorded_prose() -> None:
    """Drafters that look up one, two or three words, on English prose in which a passage comes again."""
    from vllm_ext.evaluation import corpus

    words = corpus.load().split()[:1500]
    names = {w: i for i, w in enumerate(dict.fromkeys(words))}
    ids = [names[w] for w in words]
    stream = ids + ids[300:900]
    g, k = np.stack([successors(stream, order) for order in (1, 2, 3)], axis=1), 4
    total, fixed = played_loss(g, k)
    assert (total - fixed.min()) / len(stream) <= math.sqrt((k + 1) ** 3 * math.log(3) / len(stream))
    assert (len(g) - total) >= 0.97 * (len(g) - fixed.min())  # tokens gained, in units of K + 1


def test_time_counts() -> None:
    """Equal acceptance: the faster drafter wins; a slower one wins where it brings more tokens a second."""
    equal, better = Slot(2, 4, cost=[1.0, 1.5]), Slot(2, 4, cost=[1.0, 1.5])
    for _ in range(50):
        equal.push(np.array([0.6, 0.6]))
        better.push(np.array([0.2, 0.9]))
    assert hedge.leader(equal.floats, 2) == 0
    assert hedge.leader(better.floats, 2) == 1


def test_sampling_follows_the_weights() -> None:
    slot = Slot(3, 2)
    slot.floats[3:6] = [0.2, 0.5, 0.3]
    picks = [hedge.sample(slot.floats, 3, u) for u in (np.arange(1000) + 0.5) / 1000]
    assert np.bincount(picks, minlength=3).tolist() == [200, 500, 300]


def test_the_ratio_form_is_unbiased() -> None:
    """Over the target's own trajectories, by enumeration: E[L] with g = min(1, q(y)/p(y)) is the expected length."""
    rng, vocab, k = np.random.default_rng(3), 3, 3
    p = {c: rng.dirichlet(np.ones(vocab)) for t in range(k) for c in itertools.product(range(vocab), repeat=t)}
    q = {c: rng.dirichlet(np.ones(vocab)) for c in p}
    estimate, product, truth = 0.0, 0.0, 0.0
    for y in itertools.product(range(vocab), repeat=k):
        at = [(p[y[:t]], q[y[:t]], y[t]) for t in range(k)]
        target = math.prod(a[v] for a, _, v in at)
        draft = math.prod(b[v] for _, b, v in at)
        estimate += target * (1 + np.cumprod([min(1, b[v] / a[v]) for a, b, v in at]).sum())
        product += target * (1 + np.cumprod([np.minimum(a, b).sum() for a, b, _ in at]).sum())
        truth += draft * (1 + np.cumprod([min(1, a[v] / b[v]) for a, b, v in at]).sum())
    assert estimate == pytest.approx(truth, abs=1e-12)
    assert abs(product - truth) > 1e-3


def test_compiles() -> None:
    """The functions are made to be compiled; the same numbers come out."""
    numba = pytest.importorskip("numba")
    source = {name: getattr(hedge, name) for name in ("weights", "push", "reset", "leader")}
    fast = dict(source["push"].__globals__)
    for name, function in source.items():
        clone = type(function)(function.__code__, fast, name)
        fast[name] = numba.njit(clone)
    rng, plain = np.random.default_rng(4), Slot(4, 5)
    compiled = Slot(4, 5)
    for _ in range(30):
        g = rng.random(4)
        plain.push(g)
        fast["push"](g, compiled.cost, compiled.floats, compiled.ints, 4, 5)
    assert compiled.regret == pytest.approx(plain.regret, abs=1e-12)
    assert fast["leader"](compiled.floats, 4) == hedge.leader(plain.floats, 4)
