"""Shapes against published sizes, byte counts, refusals, and a smoke run of the decode benchmark."""

from __future__ import annotations

import json
import sys

import pytest

from vllm_ext.bench import shapes
from vllm_ext.bench.decode import Case, Plan, _times, parse_case
from vllm_ext.cli import main
from vllm_ext.evaluation.rows import parse_row
from vllm_ext.options import ConfigError

# Parameters as the model cards count them.
PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-8b": 8_190_735_360,
    "qwen2.5-1.5b": 1_543_714_304,
    "smollm2": 134_515_008,
    "olmoe-1b-7b": 6_919_161_856,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_shape_has_the_published_size(name):
    config = shapes.load_shape(name)
    embedding = 0 if config["tie_word_embeddings"] else config["vocab_size"] * config["hidden_size"]
    assert shapes.weight_bytes(config) // 2 + embedding == PARAMETERS[name]
    assert config["max_position_embeddings"] >= 131072 + 2048


def test_weights_of_the_experts_that_a_batch_hits():
    config = shapes.load_shape("olmoe-1b-7b")
    every, one = shapes.weight_bytes(config), shapes.weight_bytes(config, 1)
    assert every - one == 16 * (64 - 8) * 3 * 2048 * 1024 * 2
    assert one < shapes.weight_bytes(config, 8) < shapes.weight_bytes(config, 64) <= every
    dense = shapes.load_shape("qwen3-8b")
    assert shapes.weight_bytes(dense, 1) == shapes.weight_bytes(dense)


def test_kv_bytes():
    config = shapes.load_shape("llama-3.1-8b")
    assert shapes.kv_bytes(config, [1.0]) == 131072
    quest = parse_row("quest:budget=4096").attention()
    dense = shapes.kv_bytes(config, [32768.0] * 8)
    sparse = shapes.kv_bytes(config, [32768.0] * 8, quest)
    # 2 dense layers, 30 that read 4096 keys and the min/max of 512 pages of 64.
    layer = 8 * 128 * 2
    assert sparse == 8 * (2 * 2 * layer * 32768 + 30 * (2 * layer * 4096 + 512 * 2 * layer))
    assert shapes.kv_bytes(config, [8192.0], quest) == shapes.kv_bytes(config, [8192.0])
    assert dense / sparse > 4


def test_cases_and_plan():
    assert parse_case("8x32768") == Case(8, 32768)
    for bad in ("8", "x", "8*100", "0x100", "8x0", "-1x5"):
        with pytest.raises(ConfigError, match="BATCHxCONTEXT"):
            parse_case(bad)
    tiny = shapes.load_shape("tiny")
    with pytest.raises(ConfigError, match="positions"):
        Plan(tiny, (Case(1, 10**7),)).check()
    with pytest.raises(ConfigError, match="--steps"):
        Plan(tiny, (Case(1, 100),), steps=0).check()


def test_times_drop_the_warmup():
    plan = Plan(shapes.load_shape("tiny"), (Case(1, 10),), steps=4, repeats=2, warmup=3)
    stamps = [0.0]
    for gap in [9.0] * 3 + [1.0, 2.0, 1.0, 2.0] + [3.0] * 4:
        stamps.append(stamps[-1] + gap)
    from collections import Counter

    found = _times(stamps, Counter({"FULL": 8}), plan)
    assert found["windows_s"] == [1.5, 3.0]
    assert found["tpot_s"] == 2.25
    assert found["steps"] == 8


BAD = [
    (["--shape", "lama-3.1-8b", "--case", "1x100"], "did you mean 'llama-3.1-8b'"),
    (["--shape", "tiny", "--case", "100"], "--case"),
    (["--shape", "tiny", "--case", "1x100", "--steps", "0"], "--steps"),
    (["--shape", "tiny", "--case", "1x100", "--plugins", "quest:budget"], "malformed"),
    (["--shape", "tiny", "--case", "1x100", "--plugins", "nope"], "nope"),
]


@pytest.mark.parametrize(("arguments", "word"), BAD)
def test_bad_input(arguments, word, assert_refused):
    assert_refused(["bench", "decode", *arguments], word)


@pytest.mark.parametrize("arguments", [["kernels", "--case", "1x1024"], ["kv-kernels"]])
def test_kernels_need_cuda(arguments, monkeypatch, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present")
    monkeypatch.setattr(sys, "argv", ["vllm-ext", "bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "CUDA" in capsys.readouterr().err


def test_kernel_inputs_are_peaked_and_consistent():
    """The benchmark's own check of a kernel: small error, and a few pages carry the attention."""
    import torch

    from vllm_ext.bench import kernels
    from vllm_ext.kernels import reference

    batch = kernels.make_batch(Case(1, 2048), 512, device="cpu")
    layer = batch.layers[0]
    everything, _ = reference.sparse_attention(layer.q, layer.k, layer.v, layer.table[0], None, batch.length, 0.0884)
    scores = reference.page_scores(layer.q, layer.k, layer.index, layer.table[0], batch.length, 0.0884, "bound", "max")
    ids = reference.select_pages(scores, batch.length, 1, kernels.PAGE, batch.capacity, 1, 2)
    few, _ = reference.sparse_attention(layer.q, layer.k, layer.v, layer.table[0], ids, batch.length, 0.0884)
    difference = (few.float() - everything.float()).norm() / everything.float().norm()
    assert difference < 0.05
    assert torch.equal(layer.index, reference.index_record(layer.k, "minmax"))


@pytest.mark.engine
def test_decode_smoke(tmp_path, monkeypatch):
    """Two cases on a tiny dummy model, stock only: every step timed, record and plot written."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    command = ["vllm-ext", "bench", "decode", "--shape", "tiny", "--case", "3x300", "--case", "1x700"]
    command += ["--steps", "6", "--repeats", "2", "--warmup", "2", "--eager", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    (row,) = json.loads((tmp_path / "decode.json").read_text())["results"]
    assert [c["case"] for c in row["cells"]] == ["3x300", "1x700"]
    for cell in row["cells"]:
        assert cell["steps"] == 12
        assert len(cell["windows_s"]) == 2
        assert 0 < cell["floor_s"] < cell["tpot_s"]
        assert cell["ratio"] == 1.0
    assert (tmp_path / "decode.png").stat().st_size > 5000
