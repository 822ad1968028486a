"""Output laws of the verification rules, by enumeration in float64, and controls that must fail."""

from __future__ import annotations

import pytest
import torch
from spec_batches import RULES, Sampler, Tree, by_rule, chi_square, normalized, output_law, residuals, stop_law, tv
from torch import Tensor

from vllm_ext.kernels import spec_reference as ref
from vllm_ext.kernels.spec_rules import Rule

LOSSLESS = {"ratio": Rule("ratio"), "hsd": Rule("hsd"), "cactus 0": Rule("cactus", delta=0.0)}
SIZES = [(2, 1), (2, 2), (2, 4), (3, 3), (4, 2), (4, 4)]
TOLERANCE = 1e-12


def laws_of(kind: str, vocab: int, k: int, seed: int) -> tuple[Tree, Tree]:
    """Target and draft trees; `kind` makes them a corner case."""
    target, draft = Tree(vocab, k + 1, seed), Tree(vocab, k, seed + 1000)
    hot = torch.eye(vocab, dtype=torch.float64)
    if kind == "equal":
        draft.law = target.law[:k]
    elif kind == "disjoint":
        target.law = [hot[0].expand_as(law) for law in target.law]
        draft.law = [hot[1].expand_as(law) for law in draft.law]
    elif kind == "one-hot target":
        target.law = [hot[law.argmax(1)] for law in target.law]
    elif kind == "truncated target":
        target.law = [normalized(law * (law >= law.median(1, keepdim=True).values)) for law in target.law]
    elif kind == "tiny draft":
        draft.law = [normalized(torch.where(hot[0] > 0, 1e-30, law)) for law in draft.law]
    return target, draft


@pytest.mark.parametrize("rule", LOSSLESS)
@pytest.mark.parametrize(("vocab", "k"), SIZES)
@pytest.mark.parametrize("one_hot", [False, True])
def test_lossless_rules_keep_the_law(rule: str, vocab: int, k: int, one_hot: bool) -> None:
    for seed in range(5):
        target, draft = laws_of("random", vocab, k, seed)
        law, _ = output_law(target, draft, k, by_rule(LOSSLESS[rule], one_hot))
        assert tv(law, target.joint(k + 1)) < TOLERANCE


@pytest.mark.parametrize("rule", LOSSLESS)
@pytest.mark.parametrize("kind", ["equal", "disjoint", "one-hot target", "truncated target", "tiny draft"])
@pytest.mark.parametrize("one_hot", [False, True])
def test_corner_cases_keep_the_law(rule: str, kind: str, one_hot: bool) -> None:
    for seed in range(5):
        target, draft = laws_of(kind, 3, 3, seed)
        law, accepted = output_law(target, draft, 3, by_rule(LOSSLESS[rule], one_hot))
        assert tv(law, target.joint(4)) < TOLERANCE
        want = accepted if one_hot else {"equal": 3, "disjoint": 0}.get(kind, accepted)
        assert accepted == pytest.approx(want, abs=1e-9)


def test_hsd_accepts_at_least_as_much_as_the_ratio_test() -> None:
    gains = []
    for seed in range(20):
        target, draft = laws_of("random", 3, 4, seed)
        _, block = output_law(target, draft, 4, by_rule(RULES["hsd"]))
        _, token = output_law(target, draft, 4, by_rule(RULES["ratio"]))
        gains.append(block - token)
    assert min(gains) > -TOLERANCE
    assert max(gains) > 0.05


def test_hsd_equals_the_ratio_test_on_deterministic_drafts() -> None:
    target, draft = laws_of("random", 3, 4, 0)
    _, block = output_law(target, draft, 4, by_rule(RULES["hsd"], one_hot=True))
    _, token = output_law(target, draft, 4, by_rule(RULES["ratio"], one_hot=True))
    assert block == pytest.approx(token, abs=TOLERANCE)


def test_published_example() -> None:
    """V = 2, K = 2, p = (1/3, 2/3), q = (2/3, 1/3): 1.111 tokens by the ratio test, 1.222 by blocks."""
    target, draft = Tree(2, 3, 0), Tree(2, 2, 0)
    target.law = [torch.tensor([[1.0, 2.0]], dtype=torch.float64).expand(2**t, 2) / 3 for t in range(3)]
    draft.law = [torch.tensor([[2.0, 1.0]], dtype=torch.float64).expand(2**t, 2) / 3 for t in range(2)]
    assert output_law(target, draft, 2, by_rule(RULES["ratio"]))[1] == pytest.approx(10 / 9)
    assert output_law(target, draft, 2, by_rule(RULES["hsd"]))[1] == pytest.approx(11 / 9)
    law, accepted = output_law(target, draft, 2, uncapped)
    assert accepted == pytest.approx(4 / 3)
    assert tv(law, target.joint(3)) == pytest.approx(1 / 9)


def uncapped(p: Tensor, q: Tensor, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Control: the whole draft is kept with its uncapped joint ratio, then p continues."""
    found = ref.hsd(p, q, x, n)
    joint = (ref.at_tokens(p, x) / ref.at_tokens(q, x)).prod(1).clamp(max=1)
    accept = torch.cat([found.accept[:, :-1], joint[:, None]], 1)
    return stop_law(accept, x.shape[1], True), normalized(residuals(found, p, q, x, n))


def same_uniform(p: Tensor, q: Tensor, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Control: the uniform that rejected also draws the residual token, by inversion."""
    found = ref.ratio(p, q, x, n)
    edge = torch.nn.functional.pad(normalized(residuals(found, p, q, x, n)).cumsum(2), (1, 0))
    low = torch.nn.functional.pad(found.accept, (0, 1))[..., None]
    return stop_law(found.accept, x.shape[1], False), normalized(edge.clamp(min=low).diff(dim=2))


def plain_after_reject(p: Tensor, q: Tensor, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Control: after a rejection the token comes from p instead of the residual."""
    return stop_law(ref.ratio(p, q, x, n).accept, x.shape[1], False), p


def stopping(keep: int) -> Sampler:
    """Drafting ends at the first token of low probability; `keep` 1: that token is still verified, 0: it is dropped."""

    def laws(p: Tensor, q: Tensor, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        low = ref.at_tokens(q, x) < 0.3
        first = (~low).long().cumprod(1).sum(1)
        return by_rule(RULES["hsd"])(p, q, x, (first + keep).clamp(max=x.shape[1]))

    return laws


def cut_by_grammar(rule: Rule, keep: int, one_hot: bool = False) -> Sampler:
    """Token 0 breaks the grammar: such a draft is cut there. `keep` 1: it still counts, as one rejected in advance."""

    def laws(p: Tensor, q: Tensor, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        first = (x > 0).long().cumprod(1).sum(1)
        x = torch.where(torch.arange(x.shape[1]) < first[:, None], x, -1)
        return by_rule(rule, one_hot)(p, q, x, (first + keep).clamp(max=x.shape[1]))

    return laws


@pytest.mark.parametrize("rule", LOSSLESS)
def test_drafts_cut_by_a_grammar(rule: str) -> None:
    """A sampled draft that was cut leaves the residual law, a deterministic one the target's; p after both fails."""
    wrong = 0.0
    for seed in range(10):
        target, draft = laws_of("random", 3, 3, seed)
        target.law = [normalized(law * torch.tensor([0.0, 1.0, 1.0])) for law in target.law]
        for keep, one_hot in ((1, False), (0, True)):
            law, _ = output_law(target, draft, 3, cut_by_grammar(LOSSLESS[rule], keep, one_hot))
            assert tv(law, target.joint(4)) < TOLERANCE
        wrong += tv(output_law(target, draft, 3, cut_by_grammar(LOSSLESS[rule], 0))[0], target.joint(4)) / 10
    assert wrong > 0.01


@pytest.mark.parametrize("control", [uncapped, same_uniform, plain_after_reject, stopping(0)])
def test_controls_fail(control: Sampler) -> None:
    distances = []
    for seed in range(10):
        target, draft = laws_of("random", 3, 3, seed)
        distances.append(tv(output_law(target, draft, 3, control)[0], target.joint(4)))
    assert sum(distances) / len(distances) > 0.005


def test_a_draft_law_other_than_the_drawn_one_fails() -> None:
    """The law before temperature, where drafts were drawn after it."""
    target, draft = laws_of("random", 3, 3, 0)
    drawn = Tree(3, 3, 0)
    drawn.law = [normalized(law**2) for law in draft.law]
    law, _ = output_law(target, draft, 3, by_rule(RULES["ratio"]), drawn=drawn)
    assert tv(law, target.joint(4)) > 0.02


def test_drafting_may_stop_after_an_unlikely_token() -> None:
    for seed in range(10):
        target, draft = laws_of("random", 3, 3, seed)
        assert tv(output_law(target, draft, 3, stopping(1))[0], target.joint(4)) < TOLERANCE


def emitted_with(by_position: bool, count: int = 30000) -> float:
    """p-value of the first four tokens of `hsd` steps whose uniforms are keyed by position or by step."""
    generator = torch.Generator().manual_seed(3)
    v, k, size = 2, 2, 4
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    by_place = torch.rand(count, 2 * size + k, generator=generator)
    text, length = torch.zeros(count, size, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    for _ in range(size):
        x = torch.multinomial(q, count * k, replacement=True, generator=generator).view(count, k)
        fresh = torch.rand(count, k, generator=generator)
        u = by_place.gather(1, length[:, None] + torch.arange(k)) if by_position else fresh
        laws = ref.Dense(p.expand(count, k + 1, v), q.expand(count, k, v), x, torch.full((count,), k), None)
        noise = torch.empty(count, v).exponential_(generator=generator)
        tokens, emitted = ref.emit(Rule("hsd"), laws, u, noise)
        for i in range(k + 1):
            there = (i < emitted) & (length < size)
            text[there, length[there]] = tokens[there, i]
            length[there] += 1
    cells = (text * v ** torch.arange(size)).sum(1)
    return chi_square(cells, torch.cartesian_prod(*[p] * size).prod(1).view([v] * size).permute(3, 2, 1, 0).flatten())


def test_uniforms_belong_to_a_step() -> None:
    """A backward rule has looked at the uniforms of positions that the next step decides again."""
    assert emitted_with(by_position=False) > 1e-3
    assert emitted_with(by_position=True) < 1e-9


# Cactus


def pairs(seed: int, count: int = 4000, vocab: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = 2 * torch.randn(2, count, vocab, generator=generator, dtype=torch.float64)
    return draw[0].softmax(1), draw[1].softmax(1)


def cactus_laws(p: Tensor, q: Tensor, delta: float, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(gamma [B, V], h [B, V (drafted), V], output law [B, V]) by the definition, for every drafted token."""
    vocab = p.shape[1]
    gamma = ref.raised(p, delta, exact)
    eye = torch.eye(vocab, dtype=torch.bool)
    others = p[:, None] * ((1 - gamma) / (1 - p))[..., None]
    h = torch.where(eye, gamma[:, None].expand(-1, vocab, -1), others)
    accept = (gamma / q).clamp(max=1)
    left = normalized((h - q[:, None]).clamp(min=0))
    out = q * accept + ((q * (1 - accept))[..., None] * left).sum(1)
    return gamma, h, out


def kl(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > 0, a * (a / b).log(), 0).sum(-1)


@pytest.mark.parametrize("delta", [0.1, 0.75, 1.0])
def test_cactus_keeps_its_budget(delta: float) -> None:
    p, q = pairs(0)
    gamma, h, out = cactus_laws(p, q, delta, exact=False)
    spent = kl(h, p[:, None])
    assert (spent[gamma <= 0.5] <= delta + 1e-12).all()
    assert (kl(out, p) <= kl(q, p) + 1e-12).all()
    exact, h, out = cactus_laws(p, q, delta, exact=True)
    assert (kl(h, p[:, None]) <= delta + 1e-9).all()
    assert (kl(out, p) <= kl(q, p) + 1e-12).all()
    full = (exact < 1) & (p > 1e-6)
    assert torch.allclose(ref.binary_kl(exact, p)[full], torch.tensor(delta, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("exact", [False, True])
def test_cactus_output_law_is_the_definition(exact: bool) -> None:
    rule = Rule("cactus", delta=0.5, exact=exact)
    for seed in range(10):
        target, draft = Tree(4, 2, seed), Tree(4, 1, seed + 50)
        law, accepted = output_law(target, draft, 1, by_rule(rule))
        p, q = target.law[0], draft.law[0]
        first = law.view(4, 4).sum(1)
        assert tv(first, cactus_laws(p, q, 0.5, exact)[2][0]) < TOLERANCE
        assert accepted > output_law(target, draft, 1, by_rule(RULES["ratio"]))[1]


def test_cactus_without_budget_is_the_ratio_test() -> None:
    p, q = pairs(1, 300)
    p, q = p[:, None].repeat(1, 2, 1), q[:, None]
    x = torch.randint(5, (300, 1))
    n = torch.ones(300, dtype=torch.long)
    for exact in (False, True):
        a, b = ref.cactus(p, q, x, n, 0.0, exact), ref.ratio(p, q, x, n)
        assert torch.equal(a.accept, b.accept)
        assert torch.equal(residuals(a, p, q, x, n), residuals(b, p, q, x, n))


def test_cactus_never_raises_what_the_target_excludes() -> None:
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for exact in (False, True):
        assert ref.raised(zero, 1.0, exact) == 0
        assert ref.raised(one, 1.0, exact) == 1


# FLy


def kept(bits: str, entropies: str, **options: object) -> str:
    """Positions kept of a draft, as text, for match bits and high (h) or low (.) entropies."""
    match = torch.tensor([[b == "1" for b in bits]])
    high = torch.tensor([[1.0 if e == "h" else 0.0 for e in entropies]])
    rule = Rule("fly", theta=0.5, **options)  # type: ignore[arg-type]
    found = ref.relaxed(match, high, torch.tensor([len(bits)]), rule)
    return "".join("1" if f else "0" for f in found[0])


@pytest.mark.parametrize(
    ("bits", "entropies", "window", "want"),
    [
        ("1111", "....", 2, "1111"),
        ("1011", ".h..", 2, "1111"),
        ("1011", "....", 2, "1011"),  # the target was sure
        ("1010", ".h..", 2, "1010"),  # the window is broken
        ("1101", "..h.", 2, "1101"),  # the window leaves the step
        ("10110111", ".h..h...", 2, "11111111"),
        ("10101111", ".h.h....", 2, "10111111"),  # a mismatch in the window of another
        ("0", "h", 0, "1"),
        ("0000", "hh.h", 0, "1101"),
    ],
)
def test_fly_table(bits: str, entropies: str, window: int, want: str) -> None:
    assert kept(bits, entropies, window=window) == want


def test_fly_as_published_in_code_counts_the_mismatch_into_the_window() -> None:
    assert kept("01", "h.", window=2, entropy="top3") == "01"
    assert kept("011", "h..", window=2, entropy="top3") == "111"
    assert kept("010", "h..", window=2, entropy="top3") == "110"
    assert kept("010", "h..", window=2) == "010"


def test_fly_keeps_at_least_the_strict_prefix() -> None:
    generator = torch.Generator().manual_seed(0)
    match = torch.rand(500, 12, generator=generator) < 0.7
    entropies = torch.rand(500, 12, generator=generator)
    n = torch.randint(13, (500,), generator=generator)
    for rule in (Rule("fly", theta=0.3, window=3), Rule("fly", theta=0.3, window=3, entropy="top3")):
        assert (ref.relaxed(match, entropies, n, rule) | ~match).all()
    never = ref.relaxed(match, entropies, n, Rule("fly", theta=float("inf"), window=3))
    assert torch.equal(never, match)


def test_entropies() -> None:
    uniform = torch.full((1, 8), 1 / 8)
    assert ref.entropy(uniform, "normalized") == pytest.approx(1.0)
    assert ref.entropy(uniform, "top3") == pytest.approx(1.0986, abs=1e-4)
    assert ref.entropy(torch.eye(8)[:1], "normalized") == 0
    half = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert ref.entropy(half, "normalized") == pytest.approx(0.5)
    assert ref.entropy(half, "top3") == pytest.approx(0.6931, abs=1e-4)


# Whole steps


@pytest.mark.parametrize("name", RULES)
def test_law_of_whole_steps(name: str) -> None:
    """First two tokens of 100,000 steps through `emit`, against the law by enumeration (FLy: the strict rule's)."""
    rule, count, vocab, k = RULES[name], 100_000, 4, 2
    target, draft = Tree(vocab, k + 1, 5), Tree(vocab, k, 6)
    generator = torch.Generator().manual_seed(1)
    x = torch.multinomial(draft.law[0].expand(count, -1), 1, generator=generator)
    x = torch.cat([x, torch.multinomial(draft.law[1][x[:, 0]], 1, generator=generator)], 1)
    p = torch.stack(
        [target.law[0].expand(count, -1), target.law[1][x[:, 0]], target.law[2][x[:, 0] * vocab + x[:, 1]]], 1
    )
    q = torch.stack([draft.law[0].expand(count, -1), draft.law[1][x[:, 0]]], 1)
    sure = torch.zeros(count, k) if rule.kind == "fly" else None
    laws = ref.Dense(p, None if rule.kind == "fly" else q, x, torch.full((count,), k), sure)
    u = torch.rand(count, k, generator=generator)
    tokens, length = ref.emit(rule, laws, u, torch.empty(count, vocab).exponential_(generator=generator))
    second = torch.multinomial(target.law[1][tokens[:, 0]], 1, generator=generator)[:, 0]
    second = torch.where(length > 1, tokens[:, 1], second)
    law = output_law(target, draft, k, by_rule(rule, one_hot=rule.kind == "fly"))[0].view(vocab * vocab, -1).sum(1)
    assert chi_square(tokens[:, 0] * vocab + second, law) > 1e-4
    if rule.lossless or rule.kind == "fly":
        assert tv(law, target.joint(2)) < TOLERANCE
