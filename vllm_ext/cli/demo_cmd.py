"""`vllm-ext demo`: real servers, real weights, the answers side by side."""

from __future__ import annotations

import importlib.util
import shlex
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_ext.options import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_ext.demo.session import Plan, Question, Result


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("demo")(demo)


def demo(
    short: Annotated[bool, typer.Option("--short", help="2 needles of 1,500 tokens instead of 5 of 3,000.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
    keep_logs: Annotated[bool, typer.Option("--keep-logs", help="Keep the servers' logs, print their paths.")] = False,
) -> None:
    """Ask a server with Quest, then one without plugins, for numbers hidden in long prose, and compare.

    Builds SmolLM2-135M-Instruct first (once). Exit code 0: with Quest enough needles were found (4 of 5, with --short
    2 of 2), in sparse steps; 1: not; 2: something is missing here.
    """
    for package in ("vllm", "openai", "transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"the demo needs the package {package}: install vllm-ext[cpu,bench] or [cuda,bench].")
    # a terminated demo has to leave its `with` blocks, which stop the servers
    signal.signal(signal.SIGTERM, lambda number, frame: (_ for _ in ()).throw(SystemExit(128 + number)))
    from rich.console import Console

    from vllm_ext.cli.model_cmd import build
    from vllm_ext.demo.report import show
    from vllm_ext.demo.session import FULL, SHORT, make_questions

    console = Console()
    plan = SHORT if short else FULL
    model = build()
    console.print(f"model: {model}", highlight=False, soft_wrap=True)
    questions = make_questions(model, plan)
    results = _run_all(console, model, plan, questions, keep_logs)
    show(console, questions, results)
    problems = verdict(plan, questions, results)
    if json_file is not None:
        _save(json_file, plan, questions, results, problems)
    for problem in problems:
        console.print(f"failed: {problem}", style="red", highlight=False)
    if not problems:
        console.print(f"passed: {results[0].found(questions)} of {plan.needles} needles found with Quest.")
    raise typer.Exit(1 if problems else 0)


def _save(
    path: Path, plan: Plan, questions: Sequence[Question], results: Sequence[Result], problems: Sequence[str]
) -> None:
    from dataclasses import asdict

    from vllm_ext import records

    asked = [{"label": q.label, "question": q.text, "expected": q.expected} for q in questions]
    content = {"passed": not problems, "problems": list(problems), "servers": [r.as_json() for r in results]}
    try:
        records.save(records.record("demo", content, plan=asdict(plan), questions=asked), path)
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error.strerror}; choose another file.") from None


def verdict(plan: Plan, questions: Sequence[Question], results: Sequence[Result]) -> list[str]:
    """What keeps the demo from passing, one sentence each; looks at the first server, the one with Quest."""
    quest, problems = results[0], []
    if (found := quest.found(questions)) < plan.required:
        problems.append(f"Quest found {found} of {plan.needles} needles, {plan.required} are required.")
    density = quest.metric("attention_density")
    # not (a < b) also catches the NaN of a server that took no decode step
    if density is None or not density < 1.0:
        problems.append(f"no sparse step was counted (attention density {density}), so nothing was shown of Quest.")
    return problems


def device_settings() -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of `vllm serve` for this machine, beyond the model and the plugins."""
    import torch

    common = ["--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "8"]
    if torch.cuda.is_available():
        return [*common, "--gpu-memory-utilization", "0.5"], {}
    # on a CPU compiling takes longer than all the questions; both servers run without it
    return [*common, "--enforce-eager"], {"VLLM_CPU_KVCACHE_SPACE": "2"}


def _run_all(console: Console, model: Path, plan: Plan, questions: Sequence[Question], keep_logs: bool) -> list[Result]:
    from vllm_ext.demo.session import run
    from vllm_ext.serving import Server, ServerError

    args, env = device_settings()
    results = []
    for label, plugin in (("with Quest", plan.plugin_args()), ("without plugins", [])):
        with console.status(f"{label}: starting") as status:

            def waiting(seconds: float, line: str, status: Any = status, label: str = label) -> None:
                status.update(f"{label}: waiting for health, {seconds:.0f} s  [dim]{_plain(line)}[/dim]")

            def asking(question: Question, status: Any = status, label: str = label) -> None:
                status.update(f"{label}: {question.label}")

            log = Path(tempfile.mkstemp(prefix="vllm-ext-demo-", suffix=".log")[1]) if keep_logs else None
            server = Server(model, [*args, *plugin], env=env, log=log, on_wait=waiting)
            shown = shlex.join(["vllm", "serve", str(model), *args, *plugin])
            console.print(f"{label}: {shown}", highlight=False, soft_wrap=True)
            try:
                results.append(run(server, label, questions, asking))
            except ServerError as error:
                raise ConfigError(f"the server {label} did not start; its log is {server.log_path}. {error}") from None
        if keep_logs:
            console.print(f"{label}: log {server.log_path}", highlight=False, soft_wrap=True)
    return results


def _plain(line: str) -> str:
    """A log line that fits beside the progress text and holds no markup."""
    from rich.markup import escape

    from vllm_ext.demo.session import message

    return escape(message(line)[:60])
