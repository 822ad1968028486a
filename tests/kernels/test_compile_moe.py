"""The expert kernels compile for an H100 (sm_90) without a GPU: tensor cores, TMA, shared memory, no spills.

In a process of their own: this one runs Triton in the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

SHARED = 232448
"""Bytes of shared memory that a block can have on sm_90."""

CHILD = r"""
import json, re, subprocess, sys, tempfile
from dataclasses import astuple
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_ext.kernels import moe_route, sonic_moe
from vllm_ext.moe.shape import SHAPES
from vllm_ext.moe.sonic_candidates import candidates

POINTERS = dict.fromkeys(("X", "W", "Y", "OUT", "A"), "bf16") | {"WEIGHTS": "fp32"}
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_one(fn, constants, warps, stages, descriptors=None):
    constants = constants | {"PDL": True}
    signature, attributes = {}, {}
    for i, arg in enumerate(fn.arg_names):
        if arg in constants:
            signature[arg] = "constexpr"
        elif arg in (descriptors or {}):
            signature[arg] = f"tensordesc<bf16{descriptors[arg]}>"
        else:
            signature[arg] = "*" + POINTERS.get(arg, "i32") if arg.isupper() else "i32"
            if arg.isupper() or arg == "x_row":
                attributes[(i,)] = [["tt.divisibility", 16]]
    at = {arg: i for i, arg in enumerate(fn.arg_names)}
    source = ASTSource(fn, signature, constexprs={(at[k],): v for k, v in constants.items()}, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        text = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    ptx = done.asm["ptx"]
    return {
        "shared": done.metadata.shared, **{k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)},
        "wgmma": ptx.count("wgmma.mma_async"), "tma": ptx.count("cp.async.bulk.tensor"),
        "pending": sorted(set(map(int, re.findall(r"wgmma.wait_group.sync.aligned\s+(\d+)", ptx)))),
    }


def gemm(which, tile, shape):
    fixed = {"E": shape.experts, "D": shape.d, "N": shape.n, "BM": tile.bm, "BN": tile.bn, "BK": tile.bk}
    fixed |= {"GROUP": tile.group, "PROGRAMS": tile.programs, "TMA": tile.tma}
    fixed |= {"NAIVE": False, "HAS_MAP": False}
    blocks = {"W": [tile.bn, tile.bk]}
    if which == "up":
        fixed |= {"K": shape.k, "TAIL": tile.tail}
    else:
        blocks["A"] = [tile.bm, tile.bk]
    fn = sonic_moe._down if which == "down" else sonic_moe._up
    return compile_one(fn, fixed, tile.warps, tile.stages, blocks if tile.tma else None)


shape = SHAPES["qwen3-30b-a3b"]
found = {}
for bm, rows in {16: 1, 64: 24, 128: 512}.items():
    for which, every in zip(("up", "down"), candidates(shape, rows * shape.experts // shape.k)):
        every = [t for t in every if t.bm == bm]
        for tile in every if bm == 128 else every[:2] + every[-1:]:
            found[" ".join(map(str, (which, *astuple(tile))))] = gemm(which, tile, shape)
for which, bm, n, k, warps, stages in (  # of the wide search: the deepest, and those that share an SM
    ("up", 128, 128, 128, 8, 2), ("up", 64, 128, 64, 4, 2), ("down", 64, 128, 64, 4, 3), ("down", 128, 128, 128, 8, 3),
):
    tile = sonic_moe.Tile(bm, n, k, warps, stages)
    found[" ".join(map(str, (which, *astuple(tile))))] = gemm(which, tile, shape)
for experts, chunk, alone in ((8, 512, True), (512, 512, True), (128, 1024, False)):
    fixed = {"E": experts, "EB": experts, "CHUNK": chunk, "HAS_MAP": True}
    sizes = {"SUB": max(16, min(chunk, 64 if alone else 128, 16384 // experts)), "HB": 4096 // experts, "TB": 16}
    sizes |= {"K": 8, "BM": 128, "ALONE": alone}
    found[f"place {experts}"] = compile_one(moe_route._place, fixed | sizes, 8, 3)
    found[f"count {experts}"] = compile_one(moe_route._count, fixed, 4, 3)
fixed = {"E": 128, "K": 8, "D": 2048, "BD": 2048, "NAIVE": False, "HAS_MAP": False}
found["combine"] = compile_one(sonic_moe._combine, fixed, 4, 3)
print("RESULT " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Name -> resources of every tile that the search tries, and of the small kernels."""
    pytest.importorskip("triton.backends.nvidia")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-P", "-c", CHILD]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT ")[1])


def test_no_spills_and_enough_shared_memory(compiled: dict[str, dict[str, Any]]) -> None:
    bad = {k: v for k, v in compiled.items() if v["LOCAL"] or v["STACK"] > 16 or v["shared"] > SHARED}
    assert len(compiled) > 25
    assert not bad


def test_tall_tiles_keep_the_tensor_cores_busy(compiled: dict[str, dict[str, Any]]) -> None:
    """From 64 rows on: asynchronous products, of which the newest stay in flight, on tiles that TMA loads."""
    tall = {k: v for k, v in compiled.items() if k.startswith(("up 64", "up 128", "down 64", "down 128"))}
    assert len(tall) > 15
    assert not {k: v for k, v in tall.items() if not v["wgmma"] or not v["tma"]}
    assert not {k: v["pending"] for k, v in tall.items() if max(v["pending"]) != (2 if k.startswith("up") else 1)}
