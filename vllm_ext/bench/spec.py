"""Speculation on real prompts: output tokens a second, acceptance and the drafter's share, beside stock vLLM.

Greedy. A batch of B means that B requests are in flight until the prompts of the load run out. Every row serves the
same prompts with an engine in a process of its own; the first row does not speculate.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ext.bench.spec_loads import LOADS, prompts
from vllm_ext.evaluation.rows import Row, parse_row
from vllm_ext.options import ConfigError

STOCK = "vllm:"


@dataclass(frozen=True)
class SpecPlan:
    """What to time.

    Attributes:
        model: directory of the target model.
        loads: names of `spec_loads.LOADS`, served one after the other.
        batches: requests in flight.
        requests: prompts of a load, for each batch; at least four times the batch, so that most steps are full.
        output: most tokens of an answer.
        repeats: how often each load is timed, with other prompts each time; the median counts, the range is kept.
        eager, memory, max_model_len: of the engine.
        limit: seconds that a row may take, its start included; one that hangs does not stop the others.
        seed: of the prompts.
    """

    model: str
    loads: tuple[str, ...] = tuple(LOADS)
    batches: tuple[int, ...] = (1, 8, 32)
    requests: int = 16
    output: int = 192
    repeats: int = 3
    eager: bool = False
    memory: float = 0.6
    max_model_len: int = 4096
    limit: float = 1800.0
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError for loads that do not exist or numbers that time nothing."""
        for load in self.loads:
            if load not in LOADS:
                raise ConfigError(f"--load '{load}' does not exist; known: {', '.join(LOADS)}.")
        for name in ("requests", "output", "repeats", "limit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if not self.batches or min(self.batches) < 1:
            raise ConfigError("--batch must be at least 1.")


def engine_args(row: str, options: dict[str, Any]) -> dict[str, Any]:
    """Engine arguments of a row: plugins, or vLLM's own method as `vllm:METHOD,key=value`.

    Raises:
        ConfigError: unknown plugin or option, or `vllm:suffix` without the package that it is made of.
    """
    if not row.startswith(STOCK):
        return Row(row, options).engine_args()
    if options["method"] == "suffix" and importlib.util.find_spec("arctic_inference") is None:
        raise ConfigError("--row vllm:suffix needs the package arctic-inference; install it or leave the row out.")
    return {"speculative_config": options}


def parse_spec_row(text: str) -> Row:
    """A row of the table; "none" does not speculate.

    Raises:
        ConfigError: malformed text.
    """
    if text == "none":
        return Row("none")
    if not text.startswith(STOCK):
        return parse_row(text)
    method, _, rest = text.removeprefix(STOCK).partition(",")
    values = parse_row(f"vllm:{rest}").options["vllm"] if rest else {}
    given: dict[str, Any] = {"method": method, **values}
    return Row(text, given)


def bench_spec(
    plan: SpecPlan,
    rows: list[Row],
    on_row: Callable[[list[dict[str, Any]]], None] = lambda results: None,
    kept: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Time every row; one JSON-ready result a row, with one cell a load and batch. A row that fails says why.

    Args:
        on_row: called with the results so far after each row.
        kept: results of an earlier run, the first row first; rows that did not fail are not timed again.
    """
    from vllm_ext.evaluation.worker import fresh_process

    plan.check()
    # without the first row's answers nothing can be compared
    asked = {row.label for row in rows}
    usable = kept and "failed" not in kept[0]
    results = [r for r in kept if "failed" not in r or r["label"] not in asked] if usable else []
    known = {r["label"] for r in results}
    for row in [row for row in rows if row.label not in known]:
        job = {"plan": dataclasses.asdict(plan), "label": row.label, "options": row.options}
        try:
            result = fresh_process("vllm_ext.bench.spec:run_job", job, plan.limit)
        except ConfigError as error:
            result = {"label": row.label, "failed": str(error), "cells": []}
        results.append(result)
        _compare(result, results[0])
        on_row(results)
    return results


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Time one row in this process."""
    from transformers import AutoTokenizer

    from vllm_ext.evaluation.engine import engine, prepare_process
    from vllm_ext.evaluation.run import describe

    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in job["plan"].items()}
    plan = SpecPlan(**given)
    prepare_process()
    began = time.monotonic()
    arguments = {
        "max_model_len": plan.max_model_len,
        "max_num_seqs": max(plan.batches),
        "gpu_memory_utilization": plan.memory,
        "enforce_eager": plan.eager,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "seed": plan.seed,
    } | engine_args(job["label"], job["options"])
    tokenizer = AutoTokenizer.from_pretrained(plan.model)
    with engine(plan.model, arguments) as llm:
        result = {"label": job["label"], "options": job["options"], "engine": describe(llm)}
        result["engine"]["start_s"] = round(time.monotonic() - began, 1)
        clock = _DraftClock(llm)
        _serve(llm, prompts("chat", tokenizer, max(plan.batches), plan.seed + 99), max(plan.batches), 24)
        result["cells"] = [
            _cell(llm, plan, load, batch, _texts(plan, load, batch, tokenizer), clock)
            for load in plan.loads
            for batch in plan.batches
        ]
    return result


def _texts(plan: SpecPlan, load: str, batch: int, tokenizer: Any) -> list[list[list[int]]]:
    """Prompts of each repeat, all different: drafters that keep finished answers would find them again."""
    seeds = [1000 * (1000 * plan.seed + batch) + repeat for repeat in range(plan.repeats)]
    return [prompts(load, tokenizer, max(plan.requests, 4 * batch), seed) for seed in seeds]


def _cell(
    llm: Any, plan: SpecPlan, load: str, batch: int, texts: list[list[list[int]]], clock: _DraftClock
) -> dict[str, Any]:
    """Serve one load and count."""
    answers: list[list[int]] = []
    seconds, rates, steps, before = [], [], 0, _counters(llm)
    clock.reset()
    for given in texts:
        taken, found, count = _serve(llm, given, batch, plan.output)
        seconds.append(taken)
        rates.append(sum(map(len, found)) / taken)
        answers, steps = answers + found, steps + count
    drafts, drafted, *accepted_at = (a - b for a, b in zip(_counters(llm), before))
    accepted, tokens = sum(accepted_at), sum(map(len, answers))
    forwards = max(tokens - accepted, len(answers))  # steps of single requests: each emits what it accepts and one more
    return {
        "load": load,
        "batch": batch,
        "prompt_tokens": sum(len(p) for given in texts for p in given),
        "output_tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_range": [min(rates), max(rates)],
        "engine_steps": steps,
        "drafts": drafts,
        "drafted": drafted,
        "accepted": accepted,
        # of all steps, also those in which a drafter proposed nothing: comparable between runners
        "tokens_per_step": tokens / forwards,
        "drafted_per_step": drafted / max(forwards, drafts),
        "acceptance_length": 1 + accepted / drafts if drafts else 1.0,
        "accepted_at": [a / drafts for a in accepted_at] if drafts else [],
        "draft_share": clock.seconds() / sum(seconds),
        "draft_s_per_step": clock.seconds() / max(clock.count, 1),
        "answers": answers,
    }


def _serve(llm: Any, texts: list[list[int]], batch: int, output: int) -> tuple[float, list[list[int]], int]:
    """(seconds, answers in the order of the prompts, engine steps) with `batch` requests in flight."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=output, detokenize=False)
    core, waiting, answers = llm.llm_engine, list(enumerate(texts)), {}
    active = steps = 0
    began = time.perf_counter()
    while waiting or active:
        while waiting and active < batch:
            index, text = waiting.pop(0)
            core.add_request(str(index), {"prompt_token_ids": text}, params)
            active += 1
        for done in core.step():
            if done.finished:
                answers[int(done.request_id)] = list(done.outputs[0].token_ids)
                active -= 1
        steps += 1
    return time.perf_counter() - began, [answers[i] for i in range(len(texts))], steps


def _counters(llm: Any) -> list[int]:
    """vLLM's totals: drafts, drafted tokens, then accepted tokens by position in the draft."""
    found = {m.name.removeprefix("vllm:spec_decode_"): m for m in llm.get_metrics()}
    totals = [int(getattr(found.get(n), "value", 0)) for n in ("num_drafts", "num_draft_tokens")]
    return totals + [int(n) for n in getattr(found.get("num_accepted_tokens_per_pos"), "values", [])]


class _DraftClock:
    """Time between begin and end of the drafter's work in the stream (on a CPU: on the clock)."""

    def __init__(self, llm: Any) -> None:
        import torch

        self.count, self._cuda, self._seconds = 0, torch.cuda.is_available(), 0.0
        self._pairs: list[Any] = []
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        drafter = getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
        if drafter is not None:
            self._own = drafter.propose
            drafter.propose = self._timed

    def _timed(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        self.count += 1
        if not self._cuda:
            began = time.perf_counter()
            result = self._own(*args, **kwargs)
            self._seconds += time.perf_counter() - began
            return result
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        result = self._own(*args, **kwargs)
        pair[1].record()
        self._pairs.append(pair)
        return result

    def reset(self) -> None:
        """Start anew."""
        self.count, self._seconds = 0, 0.0
        self._pairs.clear()

    def seconds(self) -> float:
        """Since `reset`."""
        if self._pairs:
            self._pairs[-1][1].synchronize()
        return self._seconds + sum(a.elapsed_time(b) for a, b in self._pairs) / 1e3


def _compare(result: dict[str, Any], first: dict[str, Any]) -> None:
    """Speed relative to the first row, share of equal answers, and where drafting stops paying.

    Answers become digests; only the first row keeps them.
    """
    known = {(c["load"], c["batch"]): c for c in first["cells"]}
    for cell in result["cells"]:
        digests = [hashlib.sha256(repr(a).encode()).hexdigest()[:8] for a in cell.pop("answers")]
        if result is first:
            cell["answers"] = " ".join(digests)
        base = known.get((cell["load"], cell["batch"]))
        if base is not None:
            cell["ratio"] = cell["tokens_per_s"] / base["tokens_per_s"]
            pairs = list(zip(digests, base["answers"].split()))
            cell["equal_answers"] = sum(a == b for a, b in pairs) / len(pairs)
    if known and result is not first:
        result["crossover"] = crossover(result["cells"])


def crossover(cells: list[dict[str, Any]]) -> dict[str, int | None]:
    """Load -> smallest measured batch from which on a row is slower than no speculation; None: it never stops paying.

    Args:
        cells: with "load", "batch" and "ratio", the speed relative to no speculation.
    """
    found: dict[str, int | None] = {}
    for load in dict.fromkeys(c["load"] for c in cells):
        falling = sorted((c for c in cells if c["load"] == load), key=lambda c: -c["batch"])
        slower = [c["batch"] for c in itertools.takewhile(lambda c: c["ratio"] < 1, falling)]
        found[load] = slower[-1] if slower else None
    return found
