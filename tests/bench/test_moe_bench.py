"""`bench moe`: floors, the table, and what it refuses without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_ext.bench import moe
from vllm_ext.moe.shape import Shape


def test_floor_counts_the_experts_that_are_hit() -> None:
    shape = Shape(experts=4, k=2, d=8, n=16)
    ids = torch.tensor([[0, 1], [0, 1], [1, 2]])
    calls = [(torch.zeros(3, 8), None, ids), (torch.zeros(3, 8), None, torch.zeros_like(ids))]
    size = (3 + 1) / 2 * (3 * 8 * 16 * 2) + 2 * 3 * 8 * 2  # two routings: 3 experts and 1; tokens in and out
    assert moe.floor(shape, calls, bandwidth=10.0, rate=7.0) == (size / 10, 6 * 3 * 2 * 8 * 16 / 7)


def test_table_names_what_is_left_to_vllm() -> None:
    from rich.console import Console

    row = {"shape": "s", "tokens": 8, "default_s": 4e-6, "sonic_s": 2e-6, "bytes_floor_s": 1e-6, "flops_floor_s": 5e-7}
    console = Console(width=130, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(moe.table([row | {"served": False}, row | {"served": True, "tuned_s": 3e-6}]))
    first, second = (line for line in console.export_text().splitlines() if " 8 " in line)
    assert "2.00x" in first
    assert "50%" in first
    assert "left to vLLM" in first
    assert "1.50x" in second
    assert "left" not in second


@pytest.mark.parametrize(("arguments", "word"), [([], "CUDA"), (["--shape", "olmoe"], "did you mean 'olmoe-1b-7b'")])
def test_refusals(arguments: list[str], word: str, assert_refused: Any) -> None:
    if word == "CUDA" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert_refused(["bench", "moe", *arguments], word)
