"""The catalogue: what ships is sound, and what is malformed is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_ext import catalogue
from vllm_ext.options import ConfigError, describe

ENTRY = "kind: attention, summary: s, paper: p, class: 'a.b:C', training: none"


def test_every_plugin_loads_and_keeps_the_contract() -> None:
    for name, entry in catalogue.load().items():
        plugin = entry.cls()()
        assert entry.kind == plugin.kind, name
        assert isinstance(plugin.engine_args(), dict)
        assert plugin.options().keys() == {row["name"] for row in describe(entry.cls())}
        for method in ("check", "banner"):
            assert callable(getattr(plugin, method))


def test_attention_plugins_exclude_each_other() -> None:
    attention = {n: p for n, p in catalogue.load().items() if p.kind == "attention"}
    for name, entry in attention.items():
        assert set(entry.conflicts) >= attention.keys() - {name}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "must be a mapping of plugin name to entry"),
        ("a: 3", "entry 'a' must be a mapping"),
        ("a: {kind: attention}", "entry 'a' needs a text for 'summary'"),
        (f"A: {{{ENTRY}}}", "plugin name 'A'"),
        (f"a: {{{ENTRY}, conflict: [b]}}", "unknown key 'conflict' in 'a'; did you mean 'conflicts'?"),
        (f"a: {{{ENTRY}, conflicts: b}}", "conflicts of 'a' must be a list"),
        (f"a: {{{ENTRY}, conflicts: [b]}}", "conflicts with unknown plugin 'b'"),
        (f"a: {{{ENTRY}, conflicts: [b]}}\nb: {{{ENTRY}}}", "'a' conflicts with 'b', but not the other way round"),
        (f"a: {{{ENTRY}, evidence: [cpu]}}", "evidence of 'a' must map"),
        (f"a: {{{ENTRY.replace('a.b:C', 'a.b.C')}}}", "must read package.module:Class"),
        (f"a: {{{ENTRY}}}\na: {{{ENTRY}}}", "line 2, column 1 ('a' is given twice)"),
        ("a: {kind: [}", "not valid YAML at line 1"),
    ],
)
def test_malformed_entries(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "plugins.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        catalogue.load(path)
    assert sentence in str(error.value)


def test_missing_catalogue(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read catalogue .*No such file"):
        catalogue.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", ["no.such.module:X", "vllm_ext.options:NoSuch", "vllm_ext.options:build"])
def test_a_class_that_cannot_be_loaded_is_named(path: str) -> None:
    entry = catalogue.Plugin("broken", "attention", "s", "p", path, "none")
    with pytest.raises(ConfigError, match="plugin 'broken'"):
        entry.cls()
