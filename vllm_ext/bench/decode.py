"""Time per output token of a decode batch, stock vLLM against plugins, on dummy weights of a named shape.

All requests decode together; only such steps are timed, on the host clock, between the results of consecutive steps
of vLLM's engine core (asynchronous scheduling and CUDA graphs as vLLM sets them). Prompts are random tokens and are
really prefilled, so every request has pages of its own; with `logit_std` their attention is left out and their keys
are synthetic (see `synthetic`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ext.bench import shapes
from vllm_ext.bench.synthetic import synthetic_prompts
from vllm_ext.evaluation.reads import Meter
from vllm_ext.evaluation.rows import Row
from vllm_ext.options import ConfigError

PREFILL_TOKENS = 8192
"""vLLM's max_num_batched_tokens in these engines."""


@dataclass(frozen=True)
class Case:
    """A batch of requests of one context length (tokens)."""

    batch: int
    context: int

    @property
    def label(self) -> str:
        """As on the command line: 8x32768."""
        return f"{self.batch}x{self.context}"


def parse_case(text: str) -> Case:
    """Read BATCHxCONTEXT.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if match is None or int(match[1]) < 1 or int(match[2]) < 2:
        raise ConfigError(f"--case '{text}' is malformed; write BATCHxCONTEXT, for example 8x32768.")
    return Case(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Plan:
    """What to time.

    Attributes:
        config: config.json of the shape.
        cases: batches.
        steps: timed decode steps a repeat.
        repeats: consecutive windows of `steps` steps of the same batch.
        warmup: decode steps of the full batch before the first window.
        eager: no CUDA graphs and no torch.compile.
        memory: vLLM's gpu_memory_utilization.
        stock_block_size: block size of the stock row; None = vLLM's default.
        seed: of the prompts.
        logit_std: standard deviation of the attention logits of synthetic keys; None = the model's own keys.
    """

    config: dict[str, Any]
    cases: tuple[Case, ...]
    steps: int = 64
    repeats: int = 5
    warmup: int = 16
    eager: bool = False
    memory: float = 0.9
    stock_block_size: int | None = None
    seed: int = 0
    logit_std: float | None = None

    def check(self) -> None:
        """Refuse values that time nothing.

        Raises:
            ConfigError: one sentence that names the option.
        """
        if not self.cases:
            raise ConfigError("--case is missing; give at least one, for example --case 8x32768.")
        for name, value, low in (("steps", self.steps, 2), ("repeats", self.repeats, 1), ("warmup", self.warmup, 1)):
            if value < low:
                raise ConfigError(f"--{name} must be at least {low}, got {value}.")
        if self.logit_std is not None and not self.logit_std > 0:
            raise ConfigError(f"--peaked must be above 0, got {self.logit_std:g}.")
        limit = self.config["max_position_embeddings"]
        if self.longest > limit:
            raise ConfigError(f"--case needs {self.longest} positions with the output, the shape has {limit}.")

    def output(self, case: Case) -> int:
        """Most output tokens of a request: those of the windows, and of the time while others are still prefilled."""
        waiting = 2 * (case.batch * case.context // PREFILL_TOKENS + case.batch)
        return waiting + self.warmup + self.steps * self.repeats + 8

    @property
    def longest(self) -> int:
        """Tokens of the longest request, output included."""
        return max(c.context + self.output(c) for c in self.cases)

    def prompts(self) -> contextlib.AbstractContextManager[None]:
        """Holds while the engine lives: what its prompts are made of."""
        return contextlib.nullcontext() if self.logit_std is None else synthetic_prompts(self.logit_std, self.seed)

    def engine_args(self, row: Row) -> dict[str, Any]:
        """Arguments of `vllm.LLM` for one row."""
        arguments = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": self.config["torch_dtype"],
            "max_model_len": self.longest,
            "max_num_seqs": max(c.batch for c in self.cases),
            "max_num_batched_tokens": PREFILL_TOKENS,
            "enable_prefix_caching": False,
            "gpu_memory_utilization": self.memory,
            "enforce_eager": self.eager,
            # Per-step graph mode comes with the scheduler's statistics.
            "disable_log_stats": False,
            "cudagraph_metrics": True,
        }
        if not row.options and self.stock_block_size:
            arguments["block_size"] = self.stock_block_size
        return arguments | row.engine_args()


def bench_rows(
    plan: Plan,
    rows: list[Row],
    on_row: Callable[[list[dict[str, Any]]], None] = lambda results: None,
    kept: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Time every row, each engine in a process of its own; the first row must be the dense one.

    `kept` holds results of an earlier run, dense first; their rows are not timed again.

    Returns:
        one JSON-ready result a row, with one cell a case; also given to `on_row` after every row.
    """
    from vllm_ext.evaluation.worker import fresh_process

    plan.check()
    results = list(kept)
    known = {r["label"] for r in results}
    for row in [row for row in rows if row.label not in known]:
        job = {"plan": dataclasses.asdict(plan), "label": row.label, "options": row.options}
        result = fresh_process("vllm_ext.bench.decode:run_job", job)
        results.append(result)
        for cell, case in zip(result["cells"], plan.cases):
            _judge(cell, plan, row, case, results[0])
        on_row(results)
    return results


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Time one row in this process: the case cells without ratios and floors."""
    from vllm_ext.evaluation.engine import engine, prepare_process
    from vllm_ext.evaluation.progress import bars
    from vllm_ext.evaluation.run import describe

    plan = Plan(**job["plan"] | {"cases": tuple(Case(**c) for c in job["plan"]["cases"])})
    row = Row(job["label"], job["options"])
    prepare_process()
    began = time.monotonic()
    result: dict[str, Any] = {"label": row.label, "options": row.options, "copy_bandwidth": shapes.copy_bandwidth()}
    model, arguments = shapes.model_dir(plan.config), plan.engine_args(row)
    with plan.prompts(), engine(model, arguments) as llm, bars(row.label) as advance:
        result["engine"] = describe(llm) | {"start_s": round(time.monotonic() - began, 1)}
        result["cells"] = [_case(llm, plan, case, advance) for case in plan.cases]
    return result


def _case(llm: Any, plan: Plan, case: Case, advance: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Times of one case, in seconds, and what its steps read; `skipped` with the reason if the batch does not fit."""
    cache = llm.llm_engine.vllm_config.cache_config
    need = case.batch * (-(-(case.context + plan.output(case)) // cache.block_size) + 1)
    if cache.num_gpu_blocks < need:
        reason = f"needs {need} KV blocks of {cache.block_size} tokens, the engine has {cache.num_gpu_blocks}"
        return {"case": case.label, "skipped": reason}
    total = plan.warmup + plan.steps * plan.repeats
    stamps: list[float] = []
    modes: Counter[str] = Counter()
    with _requests(llm, plan, case) as step:
        produced: Counter[str] = Counter()
        began = time.perf_counter()
        while len(stamps) <= total:
            outputs = step()
            now = time.perf_counter()
            for item in outputs.outputs:
                if item.finish_reason is not None:
                    raise RuntimeError(f"request {item.request_id} ended before the timing did.")
                produced[item.request_id] += len(item.new_token_ids)
            whole = len(outputs.outputs) == case.batch and min(produced.values()) > 1
            if whole:
                _note(stamps, modes, now, outputs, plan)
                if len(stamps) == plan.warmup:  # reading the counters takes time: still a step of the warm-up
                    meter = Meter(llm)
                if len(stamps) % plan.steps == 1:
                    advance(case.label, len(stamps) - 1, total)
            elif stamps:
                _stall(outputs, case)
        advance(case.label, total, total)
        read = meter.cell()
    prefill = stamps[0] - began
    lengths = [case.context + n for n in produced.values()]
    return {"case": case.label, "prefill_s": prefill, "lengths": lengths, **_times(stamps, modes, plan), **read}


def _note(stamps: list[float], modes: Counter[str], now: float, outputs: Any, plan: Plan) -> None:
    """Record a step of the whole batch."""
    stamps.append(now)
    stats = outputs.scheduler_stats
    if len(stamps) > plan.warmup + 1 and stats is not None and stats.cudagraph_stats is not None:
        modes[stats.cudagraph_stats.runtime_mode] += 1


def _stall(outputs: Any, case: Case) -> None:
    """A step without every request would falsify the times; an empty result only means that a step was queued."""
    if outputs.outputs:
        raise RuntimeError(f"case {case.label}: a timed step held {len(outputs.outputs)} of {case.batch} requests.")


def _times(stamps: list[float], modes: Counter[str], plan: Plan) -> dict[str, Any]:
    """Medians and spread of the step times; the first `warmup` steps are dropped."""
    gaps = [b - a for a, b in itertools.pairwise(stamps)][plan.warmup :]
    windows = [statistics.median(gaps[i : i + plan.steps]) for i in range(0, len(gaps), plan.steps)]
    quartiles = statistics.quantiles(gaps, n=4)
    return {
        "tpot_s": statistics.median(windows),
        "windows_s": windows,
        "step_iqr_s": [quartiles[0], quartiles[2]],
        "steps": len(gaps),
        "graph_modes": dict(modes),
    }


@contextlib.contextmanager
def _requests(llm: Any, plan: Plan, case: Case) -> Iterator[Callable[[], Any]]:
    """Add the batch, yield the function that runs one step of the engine core, and abort the batch afterwards."""
    import numpy as np
    from vllm import SamplingParams

    rng = np.random.default_rng(plan.seed)
    prompts = rng.integers(0, plan.config["vocab_size"], size=(case.batch, case.context))
    params = SamplingParams(temperature=0.0, max_tokens=plan.output(case), ignore_eos=True, detokenize=False)
    core = llm.llm_engine.engine_core
    ids = [
        llm.llm_engine.add_request(f"{case.label}-{i}", {"prompt_token_ids": p.tolist()}, params)
        for i, p in enumerate(prompts)
    ]
    try:
        yield core.get_output
    finally:
        llm.llm_engine.abort_request(ids, internal=True)
        while core.engine_core.scheduler.has_requests() or core.engine_core.batch_queue:
            core.get_output()


def _judge(cell: dict[str, Any], plan: Plan, row: Row, case: Case, stock: dict[str, Any]) -> None:
    """Add throughput, the byte floor (at the copy bandwidth that the stock row measured) and the ratio to it."""
    if "skipped" in cell:
        return
    bandwidth = stock["copy_bandwidth"]
    # Lengths are noted at the end of the timed steps; the middle of the windows is what the median stands for.
    middle = [n - plan.steps * plan.repeats / 2 for n in cell["lengths"]]
    weights, keys = shapes.weight_bytes(plan.config, case.batch), shapes.kv_bytes(plan.config, middle, row.attention())
    floor = (weights + keys) / bandwidth
    cell |= {"tokens_per_s": case.batch / cell["tpot_s"], "weight_bytes": weights, "kv_bytes": keys}
    cell |= {"floor_s": floor, "floor_fraction": floor / cell["tpot_s"]}
    dense = next((c for c in [*stock["cells"], cell] if c["case"] == case.label and "tpot_s" in c), None)
    if row.options and dense is cell:
        dense = None  # the dense row could not hold this batch
    cell["ratio"] = dense["tpot_s"] / cell["tpot_s"] if dense else None
