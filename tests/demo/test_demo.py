"""The demo: its parts on made-up answers, and the whole command in its short form with real servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vllm_ext.cli.demo_cmd import device_settings, verdict
from vllm_ext.demo import report, session
from vllm_ext.demo.session import FULL, SHORT, Answer, Plan, Question, Result

QUESTIONS = [
    Question("needle 1", "number for Oslo [is]", "1234567", (1, 2, 3)),
    Question("needle 2", "number for Lima is", "7654321", (4, 5)),
    Question("chat", "Capital?", "Paris"),
]
PLAN = Plan(needles=2, length=1500, required=2)
LOG = """\
(APIServer pid=7) INFO 11-21 19:30:31 [utils.py:10] vllm-ext: --plugins quest is short for ...
(APIServer pid=7) INFO 11-21 19:30:31 [banner.py:43] vllm-ext 0.1.0: quest
(APIServer pid=7) INFO 11-21 19:30:31 [banner.py:43]   model   /a/b
(APIServer pid=7) INFO 11-21 19:30:31 [banner.py:43]     reads  512 of them
(APIServer pid=7) INFO 11-21 19:30:32 [core.py:1] Initializing
(APIServer pid=7) INFO 11-21 19:30:32 [core.py:1]   indented later
"""


def result(right, density, label="with Quest"):
    answers = [Answer("[red]1234567[/red] and more", r, 1.0, 24, 10.0 + i) for i, r in enumerate(right)]
    metrics = {} if density is None else {"vllm_ext:attention_density": density, "vllm_ext:pages_read_total": 30912.0}
    return Result(label, ["vllm"], 30.0, answers, metrics)


@pytest.mark.parametrize(
    ("right", "density", "sentences"),
    [
        ((True, True, True), 0.5, []),
        ((True, True, False), 0.5, []),
        ((True, False, True), 0.5, ["found 1 of 2"]),
        ((True, True, True), 1.0, ["no sparse step"]),
        ((True, True, True), float("nan"), ["no sparse step"]),
        ((False, False, True), None, ["found 0 of 2", "no sparse step"]),
    ],
)
def test_verdict(right, density, sentences):
    problems = verdict(PLAN, QUESTIONS, [result(right, density), result((True,) * 3, None)])
    assert len(problems) == len(sentences)
    assert all(part in problem for part, problem in zip(sentences, problems))


@pytest.mark.parametrize(
    ("text", "right"), [(" 1234567.", True), ("is 12345678", False), ("123456", False), ("number1234567", False)]
)
def test_an_answer_is_right_when_the_number_stands_alone(text, right):
    assert session.is_right(text, "1234567") is right


def test_banner_is_cut_out_of_the_log():
    assert session.banner(LOG) == ["vllm-ext 0.1.0: quest", "  model   /a/b", "    reads  512 of them"]
    assert session.banner("INFO 11-21 19:30:31 [a.py:1] nothing") == []


def test_plugin_arguments_of_the_plans():
    assert FULL.plugin_args()[:4] == ["--plugins", "quest", "--additional-config.vllm_ext.quest.page_size", "32"]
    assert SHORT.plugin_args()[2:4] == ["--additional-config.vllm_ext.quest.budget", "768"]
    # a request of the short form is long enough to be sparse
    assert SHORT.length > SHORT.options["dense_below"]


@pytest.mark.parametrize("plan", [FULL, SHORT])
def test_options_of_the_plans_are_options_of_quest(plan):
    from vllm_ext import config

    assert config.expand(["quest"], {"quest": dict(plan.options)})
    assert plan.length > plan.options["dense_below"]  # long enough to be sparse


def test_report_shows_texts_as_they_are_and_a_dash_for_what_is_missing():
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    results = [result((True, False, True), 0.328), result((True, True, True), None, "without plugins")]
    results[0].answers[1].text = ""
    report.show(console, QUESTIONS, results)
    text = console.export_text()
    for part in ("[red]1234567[/red]", "Oslo [is]", "(nothing)", "1 of 2", "0.328", "30,912", "10.5"):
        assert part in text
    assert report.figures(QUESTIONS, results[1])["sparse steps"] == "-"
    assert report.number(float("nan")) == "-"


def test_settings_leave_vllm_stock_where_nothing_must_differ():
    import torch

    args, env = device_settings()
    assert args[:4] == ["--dtype", "bfloat16", "--max-model-len", "4096"]
    assert ("--enforce-eager" in args) is not torch.cuda.is_available()
    assert set(env) <= {"VLLM_CPU_KVCACHE_SPACE"}


def test_questions_have_the_length_of_the_plan_and_end_with_a_begun_answer():
    from transformers import AutoTokenizer

    from vllm_ext.models import smollm2

    model = smollm2()
    questions = session.make_questions(model, SHORT)
    tokenizer = AutoTokenizer.from_pretrained(model)
    *needles, chat = questions
    assert [len(q.prompt) for q in needles] == [SHORT.length] * SHORT.needles
    assert all(q.expected in tokenizer.decode(q.prompt) for q in needles)
    assert tokenizer.decode(needles[0].prompt).endswith(" is")
    assert not chat.prompt
    assert session.make_questions(model, SHORT) == questions


@pytest.mark.engine
def test_short_demo_with_real_servers(tmp_path):
    """Both servers, both needles; the tables go to the log of the test if it fails."""
    out = tmp_path / "demo.json"
    command = [str(Path(sys.executable).with_name("vllm-ext")), "demo", "--short", "--json", str(out)]
    # the interpreter of Triton kernels, which the tests switch on, is not what a user's server has
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())["results"]
    quest, stock = results["servers"]
    assert results["passed"]
    assert [a["right"] for a in quest["answers"]] == [True, True, True]
    assert 0.0 < quest["metrics"]["vllm_ext:attention_density"] < 1.0
    assert quest["metrics"]["vllm_ext:sparse_steps_total"] > 0
    assert quest["metrics"]["vllm_ext:pages_read_total"] > 0
    assert quest["banner"][0].startswith("vllm-ext ")
    assert not stock["banner"]
    assert "--plugins" not in stock["command"]
    assert not Path(quest["log"]).exists()
    assert "Traceback" not in done.stdout + done.stderr
