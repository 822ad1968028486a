"""Makefile, CI script and documents."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_ext import docs, kv_metrics, metrics, spec_metrics
from vllm_ext.options import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_generated_documents_are_current():
    stale = [path.name for path, text in docs.generate(ROOT).items() if path.read_text() != text]
    assert not stale, "run python -m vllm_ext.docs"


def test_fill_replaces_between_its_markers_only():
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb <!-- y:begin -->"
    assert docs.fill(text, "x", "new") == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb <!-- y:begin -->"
    with pytest.raises(ConfigError, match="x:begin"):
        docs.fill("no markers", "x", "new")


def test_table_escapes_the_column_separator():
    assert docs.table(["a"], [["b | c"]]).splitlines()[-1] == "| b \\| c |"


@pytest.mark.parametrize("name", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_relative_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{name} links to {target}"


def test_ci_script_is_executable_bash():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_old_python_is_refused_with_a_sentence(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "install", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "Python 3.9.1" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_help_names_every_target():
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^  make ([a-z]+)", text, re.MULTILINE)) == set(targets)


def dashboard():
    return json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())


def test_dashboard_shows_metrics_that_exist():
    board = dashboard()
    text = json.dumps(board)
    assert set(re.findall(r"vllm_ext:(\w+?)_total", text)) == {
        *metrics.NAMES, *kv_metrics.HELP, *spec_metrics.HELP
    }  # fmt: skip
    # a gauge over the whole life of a server hides what happens now, and is absent with several API servers
    assert "attention_density" not in text
    pytest.importorskip("vllm")
    import vllm.v1.metrics.loggers as loggers

    known = set(re.findall(r'name="(vllm:\w+)"', Path(loggers.__file__).read_text()))
    for name in set(re.findall(r"vllm:\w+", text)):
        assert re.sub(r"_(total|bucket)$", "", name) in known, name


def test_dashboard_divides_rates_for_the_density():
    density = next(panel for panel in dashboard()["panels"] if panel["title"] == "Attention density")
    [target] = density["targets"]
    above, below = target["expr"].split(" / ")
    assert "rate(vllm_ext:keys_read_total" in above
    assert above.replace("keys_read", "keys_visible") == below


def test_dashboard_has_the_fields_that_grafana_imports():
    board = dashboard()
    assert {"title", "uid", "schemaVersion", "version", "time", "templating", "panels"} <= board.keys()
    assert board.get("id") is None  # an id of another Grafana would be refused
    variables = {v["name"]: v["type"] for v in board["templating"]["list"]}
    assert variables == {"source": "datasource", "instance": "query"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken = set()
    for panel in board["panels"]:
        assert {"type", "title", "description", "datasource", "gridPos", "fieldConfig", "targets"} <= panel.keys()
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells
        assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            assert "rate(" in target["expr"]
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${source}"
