"""The verification kernels compile for an H100 (sm_90) where there is no GPU, and keep to its registers.

In a process of their own: this one runs Triton in the interpreter.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_ext.kernels import spec_verify


def cases() -> dict[str, tuple[str, dict[str, Any], int]]:
    """Name -> kernel, constants, warps; a vocabulary of 262,144 tokens (64 blocks), up to 7 or 31 drafts."""
    found: dict[str, tuple[str, dict[str, Any], int]] = {}
    for entropy, draft in ((0, False), (0, True), (1, False), (2, False)):
        constants = {"HAS_DRAFT": draft, "ENTROPY": entropy, "BLOCK": 4096}
        found[f"stats entropy {entropy} draft {draft}"] = ("row_stats", constants, 8)
    for kind, draft, first, exact, entropy, k in (
        (0, True, False, False, 0, 7), (1, True, True, False, 0, 7), (1, True, False, False, 0, 7),
        (1, False, False, False, 0, 7), (2, True, False, True, 0, 7), (3, False, False, False, 1, 7),
        (1, True, False, False, 0, 31), (3, False, False, False, 2, 31),
    ):  # fmt: skip
        constants = {
            "KIND": kind, "FIRST_PASS": first, "EXACT": exact, "WINDOW": 6, "ENTROPY": entropy, "HAS_DRAFT": draft,
            "KP": k + 1, "NBP": 64,
        }  # fmt: skip
        name = f"judge {kind} draft {draft} first {first} entropy {entropy} K{k}"
        found[name] = ("judge", constants, 4 if k < 16 else 8)
    found["surplus"] = ("surplus", {"BLOCK": 4096}, 8)
    for draft in (False, True):
        found[f"race draft {draft}"] = ("race", {"FIRST": 1024, "HAS_DRAFT": draft, "BLOCK": 4096}, 8)
    found["result"] = ("result", {"KP": 16, "NBP": 64}, 1)
    return found


CHILD = r"""
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_ext.kernels import spec_verify

POINTERS = {
    "L": "fp32", "DL": "bf16", "DRAFTS": "i64", "DRAFT_ROW": "i64", "POSITION": "i64", "SEED": "i64", "STOP": "i64",
    "WINNER": "i64", "OUT": "i64", "PARG": "i64", "CU": "i32", "ROW_REQUEST": "i32", "COUNT": "i32",
}
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_one(item):
    name, (kernel, constants, warps) = item
    fn = getattr(spec_verify, "_" + kernel)
    signature = {}
    for arg in fn.arg_names:
        if arg in constants:
            signature[arg] = "constexpr"
        elif arg in ("delta", "theta", "log_v"):
            signature[arg] = "fp32"
        elif arg.isupper() and len(arg) > 1 or arg == "L":
            signature[arg] = "*" + POINTERS.get(arg, "fp32")
        else:
            signature[arg] = "i32"
    signature |= {a: "i32" for a in ("NB", "V", "VD", "K") if a in signature}
    at = {arg: i for i, arg in enumerate(fn.arg_names)}
    attributes = {(at[a],): [["tt.divisibility", 16]] for a, t in signature.items() if t[0] == "*"}
    source = ASTSource(fn, signature, constexprs={(at[k],): v for k, v in constants.items()}, attrs=attributes)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        text = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return name, {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


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
        assert used["STACK"] <= 32, case
        assert used["LOCAL"] == 0, case


def test_constants_are_normal_numbers_in_fp32() -> None:
    """Triton up to 3.6 takes a smaller literal as fp64, and the arithmetic with it."""
    smallest = 2.0**-126
    for path in sorted(Path(spec_verify.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, float) and node.value:
                assert abs(node.value) >= smallest, f"{path.name}:{node.lineno}"
