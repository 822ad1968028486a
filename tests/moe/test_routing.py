"""Router formulas against fp64, their identities, and the properties of token rounding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_ext.kernels import reference_routing as routing
from vllm_ext.moe.dirmoe import DirMoE, check_heads
from vllm_ext.moe.kern import Kern
from vllm_ext.moe.method import LayerFacts
from vllm_ext.moe.token_rounding import TokenRounding, first_rounded
from vllm_ext.options import ConfigError


def logits(tokens: int, experts: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * scale


def dense(routed: tuple[torch.Tensor, torch.Tensor], experts: int) -> torch.Tensor:
    """[T, E] fp64 weights; unused columns must weigh nothing."""
    weights, ids = routed
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32
    assert bool((weights[ids < 0] == 0).all())
    table = torch.zeros(len(ids), experts + 1, dtype=torch.float64)
    table.scatter_(1, torch.where(ids < 0, experts, ids).long(), weights.double())
    return table[:, :experts]


def layer(experts: int = 8, top_k: int = 2, renormalize: bool = True, index: int = 0) -> LayerFacts:
    return LayerFacts("model.layers.0.mlp", index, experts, top_k, 16, 32, renormalize, torch.float32, "cpu", 4096)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8), (128, 8), (5, 1)])
def test_kern_is_its_formula(experts: int, top_k: int) -> None:
    """Weights to 1e-6 of fp64, the order of the logits, and no dependence on their scale when eps = 0."""
    s = logits(200, experts)
    want = 1.5 * s.double().clamp(min=0) / (s.double().norm(dim=1, keepdim=True) + 1e-6)
    kept = torch.zeros_like(want).scatter_(1, s.topk(top_k).indices, 1.0)
    got = routing.kern(s, top_k, gamma=1.5)
    assert torch.allclose(dense(got, experts), want * kept, atol=1e-6)
    large, small = (dense(routing.kern(c * s, top_k, eps=0), experts) for c in (3, 1))
    assert torch.allclose(large, small, atol=1e-6)


def test_kern_without_a_positive_logit_routes_nowhere() -> None:
    s = torch.tensor([[-1.0, -2.0, -3.0], [0.0, 0.0, 0.0], [2.0, -1.0, -1.0]])
    weights, ids = routing.kern(s, 2)
    assert ids.tolist() == [[-1, -1], [-1, -1], [0, -1]]
    assert torch.isfinite(weights).all()
    assert routing.kern(s, 2, sum_to_one=True)[0].sum(1).tolist() == [0, 0, 1]


def test_dirmoe_is_its_formula() -> None:
    """z times the Dirichlet mean, the kept ones scaled to sum 1."""
    s, high, low = logits(100, 8), logits(100, 8, 1).exp() + 1, logits(100, 8, 2).abs() * 0.1 + 1e-3
    z = torch.sigmoid(s.double() / 0.7)
    alpha = z * high + (1 - z) * low
    u = z * alpha / alpha.sum(1, keepdim=True)
    kept = torch.zeros_like(u).scatter_(1, u.topk(3).indices, 1.0) * u
    assert torch.allclose(dense(routing.dirmoe(s, 3, 0.7, high, low), 8), kept / kept.sum(1, keepdim=True), atol=1e-6)


def test_dirmoe_opens_only_gates_above_the_threshold() -> None:
    s = torch.tensor([[4.0, 3.0, -1.0, -2.0], [-3.0, -4.0, -5.0, -6.0]])
    weights, ids = routing.dirmoe(s, 3, 1.0, 9.0, 1.0, threshold=0.5)
    assert ids.tolist() == [[0, 1, -1], [0, -1, -1]]
    assert torch.allclose(weights.sum(1), torch.ones(2))
    # tau -> 0 with both gates wide open: nothing but the concentrations is left, and they are equal
    weights, _ = routing.dirmoe(s[:1], 2, 1e-3, 9.0, 1.0)
    assert weights.tolist() == [[0.5, 0.5]]


def test_concentrations_put_the_mass_on_the_open_gates() -> None:
    """The Dirichlet's mass on k of E gates is Beta(k a_hi, (E - k) a_lo); over 1e5 draws its mean is `mass`."""
    ratio = routing.concentration_ratio(0.9, 8, 2)
    alpha = torch.tensor([ratio] * 2 + [1.0] * 6)
    torch.manual_seed(0)
    drawn = torch.distributions.Dirichlet(alpha).sample((100_000,))[:, :2].sum(1)
    assert float(drawn.mean()) == pytest.approx(0.9, abs=0.003)


@pytest.mark.parametrize("renormalize", [True, False])
def test_rounding_whole_tiles_changes_nothing(renormalize: bool) -> None:
    """Every expert chosen by a multiple of the tile: plain top-k, with empty columns behind."""
    s = torch.cat([torch.roll(torch.tensor([[5.0, 4.0, 0.0, -1.0]]), 2 * i, 1) for i in (0, 1)]).repeat(32, 1)
    got = routing.token_rounding(s, 2, renormalize, tile=16, extra=1)
    assert torch.allclose(dense(got, 4), dense(routing.softmax_topk(s, 2, renormalize), 4))
    assert bool((got[1][:, 2] == -1).all())


@pytest.mark.parametrize("mode", ["nearest", "up", "down"])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "tile"), [(512, 8, 2, 64), (300, 16, 4, 16), (100, 4, 1, 128)])
def test_rounding_gives_every_expert_whole_tiles(mode: str, tokens: int, experts: int, top_k: int, tile: int) -> None:
    """With room for all columns: counts are the targets, weakest dropped and strongest added, never both."""
    s = logits(tokens, experts, seed=tokens)
    plain = dense(routing.softmax_topk(s, top_k, True), experts)
    got = dense(routing.token_rounding(s, top_k, True, tile, mode, extra=experts), experts)
    before, after = (plain > 0).sum(0), (got > 0).sum(0)
    target = routing.rounded_counts(before, tile, mode, tokens)
    assert torch.equal(after, target)
    assert bool((target % tile == 0).logical_or(target == tokens).all())
    if mode == "nearest":
        assert bool(((target - before).abs() <= tile / 2).logical_or(target == tokens).all())
    added, dropped = (got > 0) & (plain == 0), (got == 0) & (plain > 0)
    assert not bool((added.any(0) & dropped.any(0)).any())
    scores = torch.softmax(s, 1).double()
    for e in range(experts):
        if dropped[:, e].any():
            kept = (plain[:, e] > 0) & ~dropped[:, e]
            assert not kept.any() or plain[dropped[:, e], e].max() <= plain[kept, e].min()
        if added[:, e].any() and (got[:, e] == 0).any():
            assert scores[added[:, e], e].min() >= scores[(got[:, e] == 0), e].max()
            assert torch.allclose(got[added[:, e], e], scores[added[:, e], e], atol=1e-6)


def test_rounding_keeps_the_heaviest_columns_of_a_token() -> None:
    s = logits(512, 8)
    wide = dense(routing.token_rounding(s, 2, True, 64, "up", extra=6), 8)
    weights, ids = routing.token_rounding(s, 2, True, 64, "up", extra=1)
    assert ids.shape == (512, 3)
    assert torch.allclose(weights.double(), wide.topk(3).values, atol=1e-6)


def test_rounding_starts_at_two_tiles_an_expert() -> None:
    assert first_rounded(128, 2.0, 64, 8) == 2048
    router = TokenRounding(tile=16).routing(layer())
    assert router.width == 5
    assert router(None, logits(127, 8)) is None
    assert router(None, logits(128, 8))[1].shape == (128, 5)


def test_a_gamma_for_each_layer() -> None:
    plugin = Kern(gamma=(1.0, 3.0))
    s = logits(4, 8)
    one, three = (plugin.routing(layer(index=i))(None, s)[0] for i in (0, 1))
    assert torch.allclose(3 * one, three)


def test_heads_of_dirmoe_are_read_and_used(tmp_path) -> None:
    from safetensors.torch import save_file

    high, low = logits(8, 16, 1), logits(8, 16, 2)
    path = tmp_path / "heads.safetensors"
    save_file({"layers.0.high.weight": high, "layers.0.low.weight": low}, path)
    check_heads(path, (8, 16))
    x, s = logits(20, 16, 3), logits(20, 8)
    a, b = (torch.nn.functional.softplus(x @ w.T) + 1e-3 for w in (high, low))
    plugin = DirMoE(heads=str(path))
    assert torch.allclose(plugin.routing(layer())(x, s)[0], routing.dirmoe(s, 2, 1.0, a, b)[0], atol=1e-6)
    with pytest.raises(ConfigError, match="export every MoE layer"):
        plugin.routing(layer(index=3))
    with pytest.raises(ConfigError, match="of shape"):
        check_heads(path, (8, 32))
    with pytest.raises(ConfigError, match="cannot be read"):
        check_heads(tmp_path / "none", (8, 16))


def config(**hf: object) -> SimpleNamespace:
    """The parts of a VllmConfig that the checks of MoE plugins read."""
    model = SimpleNamespace(
        model="m", runner_type="generate", is_moe=True, hf_text_config=SimpleNamespace(**hf),
        get_total_num_hidden_layers=lambda: 2, get_num_experts=lambda: 8, get_num_experts_per_tok=lambda: 2,
        get_hidden_size=lambda: 16, quantization=None,
    )  # fmt: skip
    return SimpleNamespace(
        model_config=model, lora_config=None, kernel_config=SimpleNamespace(moe_backend="auto"),
        aux_output_config=SimpleNamespace(enabled=False), speculative_config=None,
        parallel_config=SimpleNamespace(data_parallel_size=1, pipeline_parallel_size=1, enable_expert_parallel=False),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "plugin", "word"),
    [
        (lambda c: setattr(c.kernel_config, "moe_backend", "flashinfer_trtllm"), Kern(), "--moe-backend triton"),
        (lambda c: setattr(c.model_config.hf_text_config, "n_group", 8), Kern(), "expert groups"),
        (lambda c: setattr(c.model_config.hf_text_config, "topk_method", "noaux_tc"), DirMoE(), "correction bias"),
        (lambda c: setattr(c.model_config.hf_text_config, "scoring_func", "sigmoid"), TokenRounding(), "sigmoid"),
        (lambda c: setattr(c, "lora_config", object()), Kern(), "LoRA"),
        (lambda c: setattr(c.aux_output_config, "enabled", True), TokenRounding(), "--enable-return-routed-experts"),
        (lambda c: setattr(c, "speculative_config", object()), TokenRounding(), "--speculative-config"),
        (lambda c: setattr(c.model_config, "quantization", "fp8"), TokenRounding(), "fp8"),
        (lambda c: None, Kern(gamma=(1.0, 2.0, 3.0)), "kern.gamma"),
    ],
)
def test_what_a_router_cannot_honour_is_refused(change, plugin, word: str) -> None:
    cfg = config()
    plugin.__class__().check(cfg)
    change(cfg)
    with pytest.raises(ConfigError, match=word):
        plugin.check(cfg)


def test_a_trace_needs_one_worker_and_a_folder(tmp_path) -> None:
    from vllm_ext.moe.trace import MoETrace

    cfg = config(n_group=8)  # grouped routing is traced as it is
    MoETrace(path=str(tmp_path / "t")).check(cfg)
    with pytest.raises(ConfigError, match=r"moe_trace\.path"):
        MoETrace(path=str(tmp_path / "gone" / "t")).check(cfg)
    cfg.parallel_config.data_parallel_size = 2
    with pytest.raises(ConfigError, match="--data-parallel-size 2"):
        MoETrace(path=str(tmp_path / "t")).check(cfg)
