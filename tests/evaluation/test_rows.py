"""Rows of the command line, and one-sentence refusals with exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from byte_tokenizer import byte_tokenizer

from vllm_ext.evaluation.rows import CONTROL, parse_row, parse_rows
from vllm_ext.options import ConfigError


def test_parse_row():
    assert parse_row("quest").options == {"quest": {}}
    row = parse_row("quest:budget=512,dense_layers=[0,1],group=max + streaming:sink=2")
    assert row.options == {
        "quest": {"budget": 512, "dense_layers": [0, 1], "group": "max"},
        "streaming": {"sink": 2},
    }
    assert parse_row("dense").label == CONTROL


def test_dense_row_is_always_first():
    rows = parse_rows(["quest:budget=512", "quest:budget=1024"])
    assert [r.options for r in rows] == [{}, {"quest": {"budget": 512}}, {"quest": {"budget": 1024}}]
    assert rows[0].engine_args() == {}
    assert rows[1].attention().budget == 512
    assert rows[1].engine_args()["block_size"] == 64


@pytest.mark.parametrize(
    "text",
    ["", ":", "quest:", "quest:budget", "quest:=3", "quest:budget=1,budget=2", "quest+quest", "a b", "quest:x=["],
)
def test_malformed(text):
    with pytest.raises(ConfigError, match="malformed"):
        parse_row(text)


def test_repeated_row():
    with pytest.raises(ConfigError, match="twice"):
        parse_rows(["quest", "quest"])


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}))
    return str(tmp_path)


BAD = [
    (["--samples", "0"], "--samples"),
    (["--task", "nia"], "--task"),
    (["--length", "5"], "--length"),
    (["--length", "100000"], "--length"),
    (["--keys", "0"], "--keys"),
    (["--keys", "21"], "--keys"),
    (["--values", "9"], "--values"),
    (["--length", "1024"], "no usable tokenizer"),
    (["--plugins", "quest:"], "malformed"),
    (["--plugins", "quets"], "did you mean 'quest'"),
    (["--plugins", "quest:budgt=512"], "did you mean 'budget'"),
    (["--plugins", "quest:budget=lots"], "quest.budget"),
    (["--plugins", "quest:budget=64"], "quest.budget"),
    (["--plugins", "quest+streaming"], "exclude"),
    (["--dtype", "int4"], "--dtype"),
    (["--memory", "2"], "--memory"),
    (["--kv-memory", "0"], "--kv-memory"),
    (["--kv-memory", "nan"], "--kv-memory"),
    (["--task", "gen", "--texts", "1"], "--texts"),
    (["--task", "gen", "--length", "3500"], "--length"),
    (["--task", "gen", "--plugins", "streaming_llm:budget=256"], "evicts inside prompts"),
]


@pytest.mark.parametrize(("arguments", "word"), BAD)
def test_bad_eval_input(arguments, word, model, assert_refused):
    assert_refused(["eval", model, *arguments], word)


def test_length_without_room(tmp_path, assert_refused):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 4096, "model_type": "llama"}))
    assert_refused(["eval", str(tmp_path), "--length", "200"], "--length 200")


def test_unreadable_model(tmp_path, assert_refused):
    assert_refused(["eval", str(tmp_path)], "not a readable model directory")
    assert_refused(["eval", str(tmp_path / "none")], "not a readable model directory")
    (tmp_path / "config.json").write_text("{")
    assert_refused(["eval", str(tmp_path)], "not JSON")


def test_kv_memory(model, monkeypatch, assert_refused):
    """The engine gets bytes and no share of the memory; on a CPU the environment variable would silently win."""
    from vllm.platforms import current_platform

    from vllm_ext.evaluation.settings import Settings

    args = Settings(model, ("kl",), kv_memory=1.5).engine_args()
    assert args["kv_cache_memory_bytes"] == 3 << 29
    assert args["gpu_memory_utilization"] < 0.05
    assert "kv_cache_memory_bytes" not in Settings(model, ("kl",)).engine_args()
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    if current_platform.is_cpu():
        assert_refused(["eval", model, "--kv-memory", "1"], "VLLM_CPU_KVCACHE_SPACE")
