"""Tables and plots of records with free generation and bytes read."""

from __future__ import annotations

import copy

import pytest

from vllm_ext import results
from vllm_ext.evaluation import report

DENSE = {"nll": 2.5, "nll_low": 2.4, "nll_high": 2.6, "distinct": 0.9, "distinct_low": 0.8, "distinct_high": 1.0}
GEN = {"length": 512, "texts": 4, "output": 20, "tokens": 80, "kl": 0.25, "kl_low": 0.2, "kl_high": 0.3} | DENSE
MORE = {"nll_more": -0.5, "nll_more_low": -0.75, "nll_more_high": -0.25}
READ = {"read": {"density": 0.25, "bytes_sparse_layers": 0.3125, "bytes": 0.35}}
PPL = {"length": 512, "texts": 4, "positions": 8, "ppl": 7.0, "low": 6.0, "high": 8.0, **MORE}
RESULTS = [
    {"label": "dense", "options": {}, "gen": [GEN | {"kl": 0.0}]},
    {"label": "quest", "options": {"quest": {}}, "budget": 128, "gen": [GEN | MORE | READ], "ppl": [PPL | READ]},
]


def test_markdown():
    head, _, dense, quest, *notes = results.quality_table({"results": RESULTS}).splitlines()
    assert head.endswith("| NLL of own text, nats | over dense's | KL to dense on it | distinct 4-grams | bytes read |")
    assert dense.endswith("| 2.5000 | – | 0.0000 (0.2000–0.3000) | 90.0% (80.0%–100.0%) | – |")
    assert "| 7.000 | -0.5000 (-0.7500–-0.2500) | 2.5000 | -0.5000 (-0.7500–-0.2500) | 0.2500" in quest
    assert quest.endswith("| 35.0% |")
    assert [n.split(":")[0] for n in notes if n] == ["* own text", "* bytes read"]


def test_tasks_that_read_differently_are_told_apart():
    found = copy.deepcopy(RESULTS)
    found[1]["gen"][0]["read"] = READ["read"] | {"bytes": 0.5}
    assert results.quality_table({"results": found}).splitlines()[3].endswith("| 35.0% (ppl), 50.0% (gen) |")


def test_a_row_without_the_law_of_its_draws_has_no_divergence():
    found = copy.deepcopy(RESULTS)
    del found[1]["gen"][0]["kl"]
    assert "| -0.5000 (-0.7500–-0.2500) | – | 90.0%" in results.quality_table({"results": found})


def test_terminal_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    assert [t.title.split()[0] for t in report.tables(RESULTS[:1])] == ["gen"]
    ppl, gen, read = report.tables(RESULTS)
    assert (ppl.row_count, gen.row_count) == (1, 2)
    assert [list(c.cells) for c in read.columns[-2:]] == [["31.2%"] * 2, ["35.0%"] * 2]
    assert report.plot(RESULTS, tmp_path / "x.png").stat().st_size > 5000
