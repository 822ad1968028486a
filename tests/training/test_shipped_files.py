"""The files that ship for SmolLM2, and what the training commands refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from vllm_ext.attention_backends.lychee import Lychee
from vllm_ext.attention_backends.rope import model_shape
from vllm_ext.attention_backends.seer import Seer

RECORDS = Path(__file__).parents[2] / "docs" / "results" / "h100"


def test_gates_are_found_and_fit(smollm2_dir: str) -> None:
    shape = model_shape(AutoConfig.from_pretrained(smollm2_dir))
    file = Seer().file(shape)
    file.check(shape, Seer().page_size, list(range(shape.layers)))
    assert file.width == shape.head_size  # what `record_elements` takes shipped gates for
    record = json.loads((RECORDS / "train-seer-smollm2.json").read_text())["results"]
    assert file.notes["steps"] == record["settings"]["steps"]
    assert file.notes["model"] == record["settings"]["model"]


def test_roles_are_found_and_fit(smollm2_dir: str) -> None:
    shape = model_shape(AutoConfig.from_pretrained(smollm2_dir))
    file = Lychee().file(shape)
    file.check(shape)
    record = json.loads((RECORDS / "train-lychee-smollm2.json").read_text())["results"]
    assert sum(map(sum, Lychee().map(file))) == record["retrieval_heads"]
    assert sum(map(sum, Lychee(retrieval_heads=5).map(file))) == shape.kv_heads + 5


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--model", "/nowhere"], "--model /nowhere is no model directory"),
        (["--window", "100"], "--window 100 must be a multiple of --page-size 64"),
        (["--width", "48"], "--width must be one of"),
        (["--text", "/nowhere.txt"], "--text /nowhere.txt cannot be read"),
        (["--out", "/tmp"], "--out /tmp is a directory"),
    ],
)
def test_refused(assert_refused, tmp_path: Path, arguments: list[str], word: str) -> None:
    given = {"--model": str(tmp_path), "--out": str(tmp_path / "gates.safetensors")}
    given |= dict(zip(arguments[::2], arguments[1::2]))
    assert_refused(["train", "seer", *(x for pair in given.items() for x in pair)], word)


def test_lychee_refuses_a_share_out_of_bounds(assert_refused, tmp_path: Path) -> None:
    where = ["--model", str(tmp_path), "--out", str(tmp_path / "roles.json")]
    assert_refused(["train", "lychee", *where, "--keep", "1.5"], "--keep must be between 0 and 1")
