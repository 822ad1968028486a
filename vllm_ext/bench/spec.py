"""Speculation on real prompts: output tokens a second, acceptance and the drafter's share, beside stock vLLM.

Greedy. A batch of B means that B requests are in flight until the prompts of the load run out. Every row serves the
same prompts with an engine in a process of its own; the first row does not speculate. Answers end after different
numbers of tokens: if all were equally long, the first row's requests would begin together again and again, with their
prompts in a few large steps, while those of a speculating row begin one by one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ext.bench import spec_engine
from vllm_ext.bench.spec_loads import LOADS, prompts
from vllm_ext.evaluation.rows import Row, parse_row
from vllm_ext.options import ConfigError

STOCK = "vllm:"
GRACE = 60.0
"""Seconds beyond a row's limit after which its process is ended: the cell that it is in may take as long."""


@dataclass(frozen=True)
class SpecPlan:
    """What to time.

    Attributes:
        model: directory of the target model.
        loads: names of `spec_loads.LOADS`, served one after the other.
        batches: requests in flight.
        requests: prompts of a load, for each batch; at least `waves` times the batch, so that most steps are full.
        waves: see `requests`.
        output: most tokens of an answer; each request's own most is between half of it and all of it.
        repeats: how often each load is timed, with other prompts each time; the median counts, the range is kept.
        eager, max_model_len: of the engine.
        kv_memory: GiB of the KV pool.
        drafts: of the rows; graphs of steps with so many drafts a request are captured in the engines of all of them.
        limit: seconds of a row, its start included: no repeat begins later. One that hangs does not stop the others.
        seed: of the prompts.
    """

    model: str
    loads: tuple[str, ...] = tuple(LOADS)
    batches: tuple[int, ...] = (1, 8, 32)
    requests: int = 16
    waves: int = 4
    output: int = 192
    repeats: int = 3
    eager: bool = False
    kv_memory: float = 8.0
    max_model_len: int = spec_engine.MODEL_LENGTH
    drafts: tuple[int, ...] = ()
    limit: float = 1800.0
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError for loads that do not exist or numbers that time nothing."""
        for load in self.loads:
            if load not in LOADS:
                raise ConfigError(f"--load '{load}' does not exist; known: {', '.join(LOADS)}.")
        for name in ("requests", "waves", "output", "repeats", "limit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.kv_memory <= 0:
            raise ConfigError(f"--kv-memory must be above 0 GiB, got {self.kv_memory:g}.")
        if not self.batches or min(self.batches) < 1:
            raise ConfigError("--batch must be at least 1.")

    def settings(self) -> dict[str, Any]:
        """What decides the numbers, for the record."""
        chosen = dataclasses.asdict(self)
        del chosen["limit"], chosen["drafts"]
        return chosen | {"graph_sizes": [] if self.eager else self.graph_sizes()}

    def graph_sizes(self) -> list[int]:
        """Tokens of the steps that every row captures."""
        return spec_engine.graph_sizes(self.batches, self.drafts)


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


def drafts(row: Row) -> set[int]:
    """Drafts a request and step that a row decodes with; 0 without speculation."""
    given: dict[str, Any] = row.options
    return {given.get("num_speculative_tokens", 0)} if row.label.startswith(STOCK) else spec_engine.drafts(row)


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
            result = fresh_process("vllm_ext.bench.spec:run_job", job, plan.limit + GRACE)
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
    arguments = {"max_model_len": plan.max_model_len, "seed": plan.seed}
    arguments |= spec_engine.engine_args(plan.batches, plan.graph_sizes(), plan.kv_memory, plan.eager)
    arguments |= engine_args(job["label"], job["options"])
    tokenizer = AutoTokenizer.from_pretrained(plan.model)
    with spec_engine.one_compiled_model(), engine(plan.model, arguments) as llm:
        result = {"label": job["label"], "options": job["options"], "engine": describe(llm)}
        result["engine"]["start_s"] = round(time.monotonic() - began, 1)
        clock, most = _DraftClock(llm), max(plan.batches)
        for count, batch in ((2 * most, most), (2, 1)):
            _serve(llm, [(text, 24) for text in prompts("mixed", tokenizer, count, plan.seed + 99)], batch)
        result["cells"], result["skipped"] = [], []
        for load, batch in itertools.product(plan.loads, plan.batches):
            texts = _texts(plan, load, batch, tokenizer)
            cell = _cell(llm, load, batch, texts, clock, began + plan.limit)
            result["cells" if cell else "skipped"].append(cell or [load, batch])
        result["seconds"] = round(time.monotonic() - began, 1)
    if not result["cells"]:
        raise ConfigError(f"row '{job['label']}' had no time left after its start; raise --limit ({plan.limit:g} s).")
    return result


Asked = list[tuple[list[int], int]]
"""Prompts, each with the most tokens of its answer."""


def _texts(plan: SpecPlan, load: str, batch: int, tokenizer: Any) -> list[Asked]:
    """Prompts of each repeat, all different: drafters that keep finished answers would find them again."""
    asked = []
    for repeat in range(plan.repeats):
        seed = 1000 * (1000 * plan.seed + batch) + repeat
        rnd = random.Random(f"{load}-{seed}-output")
        texts = prompts(load, tokenizer, max(plan.requests, plan.waves * batch), seed)
        asked.append([(text, rnd.randint((plan.output + 1) // 2, plan.output)) for text in texts])
    return asked


def _cell(
    llm: Any, load: str, batch: int, texts: list[Asked], clock: _DraftClock, until: float
) -> dict[str, Any] | None:
    """Serve one load and count; repeats that would begin after `until` are left out, None if that leaves nothing."""
    answers: list[list[int]] = []
    seconds: list[float] = []
    rates: list[float] = []
    steps, prompted, before = 0, 0, _counters(llm)
    clock.reset()
    for given in texts:
        if time.monotonic() > until:
            break
        taken, found, count = _serve(llm, given, batch)
        seconds.append(taken)
        prompted += sum(len(text) for text, _ in given)
        rates.append(sum(map(len, found)) / taken)
        answers, steps = answers + found, steps + count
    if not seconds:
        return None
    drafts, drafted, *accepted_at = (a - b for a, b in zip(_counters(llm), before))
    accepted, tokens = sum(accepted_at), sum(map(len, answers))
    forwards = max(tokens - accepted, len(answers))  # steps of single requests: each emits what it accepts and one more
    return {
        "load": load,
        "batch": batch,
        "prompt_tokens": prompted,
        "output_tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_range": [min(rates), max(rates)],
        "rates": rates,
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


def _serve(llm: Any, asked: Asked, batch: int) -> tuple[float, list[list[int]], int]:
    """(seconds, answers in the order of the prompts, engine steps) with `batch` requests in flight."""
    from vllm import SamplingParams

    core, waiting, answers = llm.llm_engine, list(enumerate(asked)), {}
    active = steps = 0
    began = time.perf_counter()
    while waiting or active:
        while waiting and active < batch:
            index, (text, most) = waiting.pop(0)
            params = SamplingParams(temperature=0.0, max_tokens=most, detokenize=False)
            core.add_request(str(index), {"prompt_token_ids": text}, params)
            active += 1
        for done in core.step():
            if done.finished:
                answers[int(done.request_id)] = list(done.outputs[0].token_ids)
                active -= 1
        steps += 1
    return time.perf_counter() - began, [answers[i] for i in range(len(asked))], steps


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
    """Speed on the same prompts relative to the first row, share of equal answers, and where drafting stops paying.

    Answers become digests; only the first row keeps them.
    """
    known = {(c["load"], c["batch"]): c for c in first["cells"]}
    for cell in result["cells"]:
        digests = [hashlib.sha256(repr(a).encode()).hexdigest()[:8] for a in cell.pop("answers")]
        if result is first:
            cell["answers"] = " ".join(digests)
        base = known.get((cell["load"], cell["batch"]))
        if base is not None:
            same = list(zip(cell["rates"], base["rates"]))  # the same prompts
            ratios = [a / b for a, b in same]
            cell["ratio"] = statistics.median(a for a, _ in same) / statistics.median(b for _, b in same)
            cell["ratio_range"] = [min(ratios), max(ratios)]
            pairs = list(zip(digests, base["answers"].split()))
            cell["equal_answers"] = sum(a == b for a, b in pairs) / len(pairs)
    if known and result is not first:
        result["crossover"] = crossover([c for c in result["cells"] if "ratio" in c])


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
