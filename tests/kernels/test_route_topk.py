"""The router kernels equal their reference, ties and odd sizes included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paged import DEVICE

from vllm_ext.kernels import reference_routing as reference
from vllm_ext.kernels import route_topk

SIZES = [(1, 8, 2), (13, 8, 2), (30, 64, 8), (5, 60, 4), (9, 128, 8), (3, 5, 5), (2, 256, 1), (2, 512, 10)]


def inputs(tokens: int, experts: int, dtype: torch.dtype = torch.float32, wide: int = 1) -> torch.Tensor:
    """Gaussian values rounded so that they tie now and then, rows `wide` times as far apart as they are long."""
    x = torch.randn(tokens, experts * wide, generator=torch.Generator().manual_seed(experts + tokens))
    return (x * 16).round().div(16).to(DEVICE, dtype)[:, :experts]


def same(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor], experts: int) -> None:
    """Equal weights column by column, and equal experts up to ties in the weights."""
    assert torch.allclose(got[0], want[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(got[1] < 0, want[1] < 0)
    for weights, ids in (got, want):
        assert bool((weights[ids < 0] == 0).all())
        kept = [row[row >= 0] for row in ids]
        assert all(len(set(r.tolist())) == len(r) and (not len(r) or int(r.max()) < experts) for r in kept)


@pytest.mark.parametrize("sum_to_one", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)
def test_kern(tokens: int, experts: int, top_k: int, sum_to_one: bool) -> None:
    for logits in (inputs(tokens, experts), inputs(tokens, experts, torch.float16, 2), -inputs(tokens, experts).abs()):
        got = route_topk.kern(logits, top_k, 1.5, 1e-6, sum_to_one)
        same(got, reference.kern(logits, top_k, 1.5, 1e-6, sum_to_one), experts)


@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)
def test_dirmoe(tokens: int, experts: int, top_k: int, heads: bool, threshold: float | None) -> None:
    logits = inputs(tokens, experts)
    raw = inputs(tokens, 2 * experts, wide=2) if heads else None
    high, low = (torch.nn.functional.softplus(raw) + 0.01).chunk(2, 1) if raw is not None else (9.0, 1.0)
    got = route_topk.dirmoe(logits, top_k, 0.5, raw, 0.01, 9.0, threshold)
    same(got, reference.dirmoe(logits, top_k, 0.5, high, low, threshold), experts)


def test_ties_go_to_the_lower_expert_and_extremes_stay_finite() -> None:
    flat = torch.ones(3, 8, device=DEVICE)
    assert route_topk.kern(flat, 3)[1].tolist() == [[0, 1, 2]] * 3
    assert route_topk.dirmoe(flat, 3, 1.0, None, 0.0, 9.0)[1].tolist() == [[0, 1, 2]] * 3
    for extreme in (torch.full((2, 8), -80.0), torch.full((2, 8), 80.0), torch.eye(8)[:2] * 1e4):
        extreme = extreme.to(DEVICE)
        for weights, _ in (route_topk.kern(extreme, 2), route_topk.dirmoe(extreme, 2, 0.1, None, 0.0, 9.0, 0.5)):
            assert bool(torch.isfinite(weights).all())


def test_no_tokens() -> None:
    weights, ids = route_topk.kern(torch.zeros(0, 8, device=DEVICE), 2)
    assert weights.shape == ids.shape == (0, 2)


COMPILE = r"""
import json, re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_ext.kernels import route_topk

cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
found = {}
for experts, top_k in ((128, 8), (512, 10)):
    for fn, flags in ((route_topk._kern, {"SUM": True}), (route_topk._dirmoe, {"HAS_HEADS": True, "CUT": True})):
        constants = route_topk.sizes(experts, top_k) | flags
        types = {"LOGITS": "*bf16", "HEADS": "*bf16", "WEIGHTS": "*fp32", "IDS": "*i32"}
        types |= dict.fromkeys(("tokens", "row", "head_row"), "i32")
        signature = {a: "constexpr" if a in constants else types.get(a, "fp32") for a in fn.arg_names}
        at = {a: i for i, a in enumerate(fn.arg_names)}
        source = ASTSource(fn, signature, constexprs={(at[k],): v for k, v in constants.items()})
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(done.asm["cubin"])
            file.flush()
            command = [cuobjdump, "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True).stdout
        found[f"{fn.__name__} {experts}"] = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
print("RESULT " + json.dumps(found))
"""


def test_kernels_compile_for_an_h100_without_spills(tmp_path: Path) -> None:
    """In a process of its own: this one runs Triton in the interpreter."""
    pytest.importorskip("triton.backends.nvidia")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-P", "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("RESULT ")[1])
    assert len(found) == 4
    assert not {k: v for k, v in found.items() if v["LOCAL"] or v["STACK"] > 16}
