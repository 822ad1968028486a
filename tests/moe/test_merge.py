"""Merging: the Nash solver against its equations, and merged checkpoints against what they must compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm_ext.moe.checkpoint import Checkpoint
from vllm_ext.moe.merge import Plan, cluster, flat, matching, merge_checkpoint
from vllm_ext.moe.nash import NoBargain, nash_weights
from vllm_ext.options import ConfigError


def wishes(count: int, size: int = 400, seed: int = 0) -> torch.Tensor:
    """Random differences with a common part, fp64."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) + 0.3 * common


@pytest.mark.parametrize("count", [1, 2, 3, 8, 32, 128])
def test_solution_satisfies_the_bargaining_equation(count: int) -> None:
    """`A alpha = 1 / alpha`, hence a step of length sqrt(N); scaling all wishes by c scales alpha by 1 / c."""
    tau = wishes(count)
    gram = tau @ tau.T
    alpha = nash_weights(gram)
    assert float((alpha * (gram @ alpha) - 1).abs().max()) < 1e-8
    assert bool((alpha > 0).all())
    assert float((alpha @ tau).norm()) == pytest.approx(count**0.5, rel=1e-9)
    assert torch.allclose(nash_weights(gram * 49), alpha / 7, rtol=1e-9)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(nash_weights(gram[order][:, order]), alpha[order], rtol=1e-9)


def test_orthogonal_duplicated_and_two_players_have_closed_forms() -> None:
    lengths = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    assert torch.allclose(nash_weights(torch.diag(lengths**2)), 1 / lengths)
    assert torch.allclose(nash_weights(torch.ones(2, 2) * 9), torch.full((2,), 1 / 18**0.5, dtype=torch.float64))
    # unit players at an angle of cosine c: alpha = 1 / sqrt(1 + c)
    for c in (-0.9, 0.0, 0.7):
        gram = torch.tensor([[1.0, c], [c, 1.0]], dtype=torch.float64)
        assert torch.allclose(nash_weights(gram), torch.full((2,), (1 + c) ** -0.5, dtype=torch.float64))


def test_wishes_that_cancel_out_have_no_solution() -> None:
    tau = wishes(5)
    for infeasible in (tau - tau.mean(0), torch.stack([tau[0], -tau[0]]), torch.stack([tau[0], torch.zeros(400)])):
        with pytest.raises(NoBargain):
            nash_weights(infeasible @ infeasible.T)


def test_clusters_join_what_is_alike() -> None:
    like = torch.eye(6)
    for i, j, s in ((0, 3, 0.9), (3, 5, 0.8), (0, 5, 0.7), (1, 4, 0.6)):
        like[i, j] = like[j, i] = s
    assert cluster(like, 3) == [[0, 3, 5], [1, 4], [2]]
    assert cluster(like, 6) == [[e] for e in range(6)]


def test_matching_undoes_a_permutation_of_neurons(tiny_moe: Callable) -> None:
    experts = Checkpoint(tiny_moe("olmoe")).experts(0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    experts.gate[1], experts.up[1], experts.down[1] = (
        experts.gate[0][order], experts.up[0][order], experts.down[0][:, order]
    )  # fmt: skip
    found = matching(experts, 0, 1)
    assert torch.equal(flat(experts, 1, found), flat(experts, 0))
    assert matching(experts, 0, 0) is None


@pytest.mark.parametrize("method", ["nash", "camex", "mean"])
def test_experts_in_identical_pairs_come_back_as_they_were(method: str, tiny_moe: Callable, tmp_path: Path) -> None:
    """Eight experts that are four, twice: any merge to four returns these, and the router rows stay means."""
    from safetensors.torch import load_file, save_file

    model = tiny_moe("mixtral")
    twin = tmp_path / "twin"
    twin.mkdir()
    weights = load_file(model / "model-00001.safetensors")
    for name in [n for n in weights if any(f"experts.{e}." in n for e in range(4))]:
        e = int(name.split("experts.")[1].split(".")[0])
        weights[name.replace(f"experts.{e}.", f"experts.{e + 4}.")] = weights[name].clone()
    save_file(weights, twin / "model.safetensors")
    (twin / "config.json").write_text((model / "config.json").read_text())
    summary = merge_checkpoint(twin, tmp_path / "out", Plan(4, method))
    merged, source = Checkpoint(tmp_path / "out"), Checkpoint(twin)
    assert (merged.num_experts, merged.top_k, summary.fallbacks) == (4, 2, 0)
    assert len({p.stat().st_mode for p in (tmp_path / "out").iterdir()}) == 1  # weights are as readable as the config
    for layer in source.layers:
        a, b = merged.experts(layer), source.experts(layer)
        assert torch.equal(a.gate, b.gate[:4])
        assert torch.equal(a.down, b.down[:4])
        assert torch.allclose(a.router, (b.router[:4] + b.router[4:]) / 2)


def test_a_step_of_one_is_the_mean_for_orthogonal_wishes(tiny_moe: Callable, tmp_path: Path) -> None:
    """Random experts are nearly orthogonal, so nash with step 1 lies close to the mean, and step 0.5 half way."""
    model = tiny_moe("olmoe")
    outs = {}
    for name, plan in (("mean", Plan(4, "mean", align=False)), ("nash", Plan(4, "nash", align=False))):
        merge_checkpoint(model, tmp_path / name, plan)
        outs[name] = Checkpoint(tmp_path / name).experts(0).gate
    assert float((outs["nash"] - outs["mean"]).norm() / outs["mean"].norm()) < 0.5
    assert not torch.equal(outs["nash"], outs["mean"])


def test_drop_keeps_the_most_used_experts(tiny_moe: Callable, tmp_path: Path) -> None:
    import numpy as np

    from vllm_ext.moe.trace_file import Trace

    model = tiny_moe("qwen3_moe")
    ids = np.array([[[7, 5], [0, 1]]] * 4 + [[[2, 3], [2, 3]]] * 2, dtype=np.uint8)
    meta = (np.array([0, 6]), np.array([0], np.int32), np.array([6], np.int32))
    trace = tmp_path / "trace.safetensors"
    Trace("tiny", 8, 2, (0, 1), ids, *meta).save(trace)
    merge_checkpoint(model, tmp_path / "out", Plan(4, "drop"), trace)
    merged, source = Checkpoint(tmp_path / "out"), Checkpoint(model)
    assert torch.equal(merged.experts(0).up, source.experts(0).up[[2, 3, 5, 7]])
    assert torch.equal(merged.experts(1).router, source.experts(1).router[[0, 1, 2, 3]])


@pytest.mark.engine
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_merged_model_loads_and_runs(
    family: str, tiny_moe: Callable, tmp_path: Path, start: Callable, generate: Callable
) -> None:
    """Stock vLLM serves it, with half the experts."""
    merge_checkpoint(tiny_moe(family), tmp_path / "out", Plan(4))
    with start(tmp_path / "out") as llm:
        assert llm.llm_engine.model_config.get_num_experts() == 4
        assert len(generate(llm, [[5, 6, 7]], 4)[0]) == 4


def test_impossible_merges_are_refused(tiny_moe: Callable, tmp_path: Path, assert_refused: Callable) -> None:
    from vllm_ext.models import tiny_llama

    model, out = str(tiny_moe("mixtral")), str(tmp_path / "out")
    assert_refused(["moe", "merge", model, out, "--experts", "1"], "between 2")
    assert_refused(["moe", "merge", model, out, "--experts", "8"], "between 2")
    assert_refused(["moe", "merge", model, out, "--experts", "4", "--method", "nahs"], "did you mean 'nash'")
    assert_refused(["moe", "merge", model, out, "--experts", "4", "--step", "0"], "--step")
    assert_refused(["moe", "merge", model, out, "--experts", "4", "--step", "nan"], "--step")
    assert_refused(["moe", "merge", model, out, "--experts", "4", "--device", "tpu"], "--device tpu is not available")
    assert_refused(["moe", "merge", model, out, "--experts", "0"], "between 2")
    assert_refused(["moe", "merge", model, out, "--experts", "-4"], "between 2")
    assert_refused(["moe", "merge", model, out, "--experts", "9"], "between 2")
    assert_refused(["moe", "merge", model, "/dev/null/out", "--experts", "4"], "cannot be made")
    assert_refused(["moe", "merge", str(tiny_llama(tmp_path / "dense")), out, "--experts", "4"], "mixture of experts")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert_refused(["moe", "merge", model, str(tmp_path / "full"), "--experts", "4"], "not empty")
    (tmp_path / "full" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a None model"):
        Checkpoint(tmp_path / "full")
