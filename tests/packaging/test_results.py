"""Tables of the README from records: a fixture record of each kind, and nothing where there is no record."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from vllm_ext import docs, records, results
from vllm_ext.options import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = Path(__file__).with_name("records")


def test_tables_of_the_fixture_records():
    assert results.tables(FIXTURES, FIXTURES) == (FIXTURES / "expected.md").read_text().rstrip("\n")


def test_fixtures_have_the_layout_that_the_commands_write():
    from vllm_ext.bench import shapes
    from vllm_ext.bench.decode import Case, Plan, _times

    written = records.record("x", [], commit="c", settings={}).keys()
    for path in FIXTURES.rglob("*.json"):
        record = json.loads(path.read_text())
        assert record["command"] == "demo" or record.keys() == written, path.name
    plan = Plan(shapes.load_shape("tiny"), (Case(1, 10),), steps=2, repeats=2, warmup=1)
    cell = _times([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], Counter(), plan)
    decode = json.loads((FIXTURES / "decode-fixture.json").read_text())
    assert cell.keys() <= decode["results"][1]["cells"][0].keys()


def test_no_record_no_table(tmp_path):
    assert results.tables(tmp_path, tmp_path) == ""
    assert results.tables(tmp_path / "absent", tmp_path) == ""
    assert docs.fill("<!-- x:begin -->\nold\n<!-- x:end -->", "x", "") == "<!-- x:begin -->\n<!-- x:end -->"


def test_a_plot_beside_the_record_is_linked(tmp_path):
    shutil.copy(FIXTURES / "decode-fixture.json", tmp_path / "decode.json")
    (tmp_path / "decode.png").touch()
    assert "[decode.json](decode.json), [decode.png](decode.png)" in results.tables(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [('{"command": "eval", "results": []}', "is no record of `vllm-ext eval`"), ("{", "is not readable JSON")],
)
def test_bad_record_is_named(tmp_path, content, sentence):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(sentence)) as error:
        results.tables(tmp_path, tmp_path)
    assert "bad.json" in str(error.value)


def test_command_line_keeps_no_local_path():
    argv = [
        "eval",
        "/a/b/model",
        "--out",
        "/c",
        "--commit=12",
        "--task",
        "kl",
        "--out=x",
        "--plugins",
        "quest:budget=1",
    ]
    assert results.command_line(argv) == "vllm-ext eval DIR/model --task kl --plugins quest:budget=1"


def test_the_page_shows_exactly_the_records():
    """Every record under docs/results that has a table is linked from docs/results.md, and no other is."""
    shown = {f"docs/{x}" for x in re.findall(r"\((results/[^)]+\.json)\)", (ROOT / "docs/results.md").read_text())}
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "docs" / "results").rglob("*.json")
        if json.loads(path.read_text()).get("command") in results.KINDS
    }
    assert shown == found
