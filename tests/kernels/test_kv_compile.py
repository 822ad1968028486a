"""The eviction kernels compile for an H100 (sm_90) where there is no GPU, and keep to its registers and shared memory.

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


def cases() -> dict[str, tuple[str, dict[str, Any], int]]:
    """Name -> kernel, constants, warps."""
    found: dict[str, tuple[str, dict[str, Any], int]] = {}
    for g, w, d in ((4, 32, 128), (3, 32, 64), (7, 32, 128), (4, 8, 128)):
        rows = max(16, 1 << (g * w - 1).bit_length())
        sizes = {"G": g, "W": w, "ROWS": rows, "P": 32, "D": d, "DP": d, "ALIGN": 16}
        window = sizes | {"TN": 64 if rows <= 128 else 32}
        warps = 8 if rows >= 128 else 4
        found[f"lse G{g} w{w} D{d}"] = ("kv_window_score._rows_lse", window, warps)
        for pool, kind in ((1, 0), (1, 1), (5, 2)) if (g, w, d) == (4, 32, 128) else ((5, 2),):
            constants = window | {"POOL": pool, "KIND": kind}
            found[f"reduce G{g} w{w} D{d} kind {kind}"] = ("kv_window_score._reduce_rows", constants, warps)
    for tile in (64, 2048):
        found[f"select {tile}"] = ("kv_select._select_survivors", {"TN": tile}, 8)
    for block, d in ((16, 64), (32, 128), (128, 80)):
        sizes = {"P": block, "C": 2 * d, "ALIGN": 16}
        found[f"compact P{block} D{d}"] = ("kv_compact._compact", sizes | {"CP": 64, "TN": 128}, 4)
        width = 1 << (2 * d - 1).bit_length()
        found[f"gather P{block} D{d}"] = ("kv_compact._gather", sizes | {"CP": width, "TN": 32}, 4)
    for d, tokens, warps in ((128, 128, 8), (64, 128, 8), (256, 64, 4)):
        sizes = {"P": 32, "D": d, "DP": d, "TN": 64, "ALIGN": 16}
        found[f"unit sums D{d}"] = ("kv_redundancy._unit_sums", sizes, 4)
        for recent in (False, True):
            constants = sizes | {"TM": tokens, "RECENT": recent, "SPAN": 6}
            found[f"redundancy D{d} recent {recent}"] = ("kv_redundancy._mean_cosine", constants, warps)
    found["window queries"] = ("kv_tables._window_queries", {"TN": 1024}, 4)
    found["shift"] = ("kv_tables._shift", {"P": 32, "TN": 1024}, 4)
    found["record"] = ("kv_tables._record", {"TN": 1024}, 4)
    return found


CHILD = r"""
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {"Q": "bf16", "K": "bf16", "CACHE": "bf16", "QUERY": "bf16", "RING": "bf16", "PTRS": "i64", "KEPT": "i64",
            "LSE": "fp32", "WEIGHTS": "fp32", "INVERSE": "fp32", "SUMS": "fp32", "SUM": "fp32", "SCORES": "fp32"}
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_one(item):
    name, (kernel, constants, warps) = item
    module, function = kernel.split(".")
    fn = getattr(importlib.import_module("vllm_ext.kernels." + module), function)
    outs = {"_select_survivors": "i64", "_gather": "bf16", "_shift": "i32", "_window_queries": "bf16"}
    out = outs.get(function, "fp32")
    signature = {}
    for arg in fn.arg_names:
        if arg in constants:
            signature[arg] = "constexpr"
        elif arg in ("scale", "threshold"):
            signature[arg] = "fp32"
        elif arg.isupper():
            signature[arg] = "*" + (out if arg == "OUT" else POINTERS.get(arg, "i32"))
        else:
            signature[arg] = "i32"
    at = {arg: i for i, arg in enumerate(fn.arg_names)}
    aligned = ("k_page", "k_head", "k_tok", "q_entry", "q_tok", "q_head", "c_page", "c_head", "c_tok")
    attributes = {(at[a],): [["tt.divisibility", 16]] for a, t in signature.items() if t[0] == "*" or a in aligned}
    source = ASTSource(fn, signature, constexprs={(at[k],): v for k, v in constants.items()}, attrs=attributes)
    options = {"num_warps": warps, "num_stages": 2 if module == "kv_window_score" else 3}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        text = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return name, {"shared": done.metadata.shared, **usage}


print("RESULT " + json.dumps(dict(map(compile_one, json.loads(sys.stdin.read()).items()))))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Resources of every case."""
    pytest.importorskip("triton.backends.nvidia")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD], input=json.dumps(cases()), capture_output=True, text=True, env=env,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT ")[1])


def test_compiles_without_spills(compiled: dict[str, dict[str, Any]]) -> None:
    for case, used in compiled.items():
        assert used["STACK"] <= 32, (case, used)
        assert used["LOCAL"] == 0, (case, used)
        assert used["shared"] <= SHARED, (case, used)


def test_two_programs_compare_keys_on_an_sm(compiled: dict[str, dict[str, Any]]) -> None:
    used = compiled["redundancy D128 recent True"]
    assert used["REG"] <= 128
    assert 2 * (used["shared"] + 1024) <= SHARED + 1024
