"""Names and options to engine arguments and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vllm_ext import catalogue, config
from vllm_ext.options import ConfigError, option

STOCK = {"attention_backend": "VLLM_EXT_SPARSE", "block_size": 64}


def test_only_given_options_are_written() -> None:
    bare = config.expand(["quest"])
    assert bare.engine_args == {**STOCK, "additional_config": {"vllm_ext": {"quest": {}}}}
    assert bare.cli[-2:] == ["--additional-config.vllm_ext.quest", "{}"]
    given = config.expand(["quest"], {"quest": {"page_size": 32, "dense_layers": (3,)}})
    assert given.engine_args["block_size"] == 32
    assert given.engine_args["additional_config"] == {"vllm_ext": {"quest": {"page_size": 32, "dense_layers": [3]}}}


def test_selection_round_trips() -> None:
    expansion = config.expand(["quest"], {"quest": {"budget": 2048, "group": "mean", "dense_below": None}})
    assert config.from_additional(expansion.engine_args["additional_config"]) == expansion.plugins
    for nothing in (None, {}, {"other": 1}, {"vllm_ext": {}}, object()):
        assert config.from_additional(nothing) == {}


@pytest.mark.parametrize(
    ("names", "options", "sentence"),
    [
        ([], {}, "--plugins needs the name of a plugin"),
        (["qest"], {}, "unknown plugin 'qest'; did you mean 'quest'?"),
        (["quest", "quest"], {}, "plugin 'quest' is named twice"),
        (["quest", "oracle_topk"], {}, "plugins 'quest' and 'oracle_topk' exclude each other"),
        (["quest"], {"streaming": {}}, "'streaming', which is not selected"),
        (["quest"], {"quset": {}}, "unknown plugin 'quset'; did you mean 'quest'?"),
        (["quest"], {"quest": {"budgt": 1}}, "no option 'budgt'; did you mean 'budget'?"),
        (["quest"], {"quest": {"budget": "many"}}, "quest.budget must be of type int, got 'many'"),
        (["quest"], {"quest": {"budget": True}}, "quest.budget must be of type int"),
        (["quest"], {"quest": {"page_size": 48}}, "quest.page_size must be one of 16, 32, 64, 128, got 48"),
        (["quest"], {"quest": {"local": 0}}, "quest.local must be at least 1"),
        (["quest"], {"quest": {"budget": 128}}, "quest.budget is 128 tokens"),
        (["quest"], {"quest": 2048}, "options of plugin 'quest' must be a mapping"),
    ],
)
def test_bad_selections(names: list[str], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.expand(names, options)
    assert sentence in str(error.value)


@pytest.mark.parametrize("section", [3, "quest", ["quest"]])
def test_section_of_the_wrong_shape(section: Any) -> None:
    with pytest.raises(ConfigError, match=r"additional_config\.vllm_ext must map"):
        config.from_additional({"vllm_ext": section})


@dataclass(frozen=True)
class Wide:
    """A plugin of another kind that wants another block size."""

    block: int = option(32, "")
    kind = "kv"

    def engine_args(self) -> dict[str, Any]:
        return {"block_size": self.block, "enable_prefix_caching": False}

    def options(self) -> dict[str, Any]:
        return {"block": self.block}


def test_plugins_that_need_different_engine_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = catalogue.Plugin("wide", "kv", "s", "p", f"{__name__}:Wide", "none")
    known = {**catalogue.load(), "wide": entry}
    monkeypatch.setattr(catalogue, "load", lambda: known)
    monkeypatch.setattr(catalogue.Plugin, "cls", lambda self: Wide if self.name == "wide" else _quest())
    with pytest.raises(ConfigError, match=r"'quest' and 'wide' need different block_size \(64 and 32\)"):
        config.expand(["quest", "wide"])
    both = config.expand(["quest", "wide"], {"wide": {"block": 64}})
    assert both.stock_args == {**STOCK, "enable_prefix_caching": False}
    assert "--no-enable-prefix-caching" in both.cli


def _quest() -> Any:
    from vllm_ext.attention_backends.quest import Quest

    return Quest


def test_plugin_file(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("quest:\n  budget: 2048\n  dense_layers: [0]\n")
    assert config.read_selection(str(path)) == (["quest"], {"quest": {"budget": 2048, "dense_layers": [0]}})
    path.write_text("quest:\n")
    assert config.read_selection(str(path)) == (["quest"], {})
    assert config.read_selection("a, b") == (["a", "b"], {})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "No such file"),
        ("quest: {budget: 1\nx: 2\n", "is not valid YAML at line"),
        ("quest:\n  budget: 1\n  budget: 2\n", "line 3, column 3 ('budget' is given twice)"),
        ("- quest\n", "not hold a list"),
        ("quest\n", "not hold a str"),
        ("", "not hold nothing"),
    ],
)
def test_bad_plugin_files(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "my.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        config.read_selection(str(path))
    assert sentence in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("value", ["", "quest,", ["quest", 3], 7])
def test_bad_names(value: Any) -> None:
    with pytest.raises(ConfigError, match="must be plugin names separated by commas"):
        config.read_selection(value)


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("a: [b\nc: d\n")
    with pytest.raises(ConfigError) as error:
        config.read_selection(str(path))
    assert "\n" not in str(error.value)
