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
