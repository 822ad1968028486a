"""`vllm-ext bench serving`: a load of requests on a fixed KV pool, stock vLLM beside plugins, each row its own engine.

Weights are dummies and prompts random, so only speed and memory mean anything. The pool is the same number of bytes
for every row; what a plugin holds outside the pool (query windows) is reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_ext.bench import shapes
from vllm_ext.evaluation.rows import Row, parse_row
from vllm_ext.options import ConfigError

STOCK = "vllm:"
"""Prefix of rows that are stock vLLM with other engine arguments, `vllm:kv_cache_dtype=fp8`."""


@dataclass(frozen=True)
class Load:
    """`requests` requests of `prompt` random tokens that generate `output` tokens each."""

    requests: int
    prompt: int
    output: int

    @property
    def label(self) -> str:
        """As on the command line: 64x16384+512."""
        return f"{self.requests}x{self.prompt}+{self.output}"

    @property
    def total(self) -> int:
        """Tokens of a request."""
        return self.prompt + self.output


def parse_load(text: str) -> Load:
    """Read REQUESTSxPROMPT+OUTPUT.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text.strip())
    if match is None or min(int(x) for x in match.groups()) < 1:
        raise ConfigError(f"--load '{text}' is malformed; write REQUESTSxPROMPT+OUTPUT, for example 64x16384+512.")
    return Load(*(int(x) for x in match.groups()))


@dataclass(frozen=True)
class ServingRow:
    """One engine: a row of plugins, or stock vLLM with `extra` engine arguments."""

    row: Row
    extra: dict[str, Any] = field(default_factory=dict)


def parse_serving_row(text: str) -> ServingRow:
    """A row of plugins, or `vllm:argument=value,...`.

    Raises:
        ConfigError: malformed text.
    """
    if text.startswith(STOCK):
        return ServingRow(Row(text), parse_row("x:" + text.removeprefix(STOCK)).options["x"])
    return ServingRow(parse_row(text))


@dataclass(frozen=True)
class ServingPlan:
    """What to serve.

    Attributes:
        config: config.json of the shape.
        loads: served one after the other by the same engine.
        pool: stock bf16 requests of the first load whose keys and values fill the pool.
        rate: requests a second (exponential gaps); None = all at once.
        seqs: max_num_seqs.
        compiled: torch.compile; else FULL decode graphs alone, which start three times as fast.
        seed: of prompts and arrivals.
    """

    config: dict[str, Any]
    loads: tuple[Load, ...]
    pool: float
    rate: float | None = None
    seqs: int = 256
    compiled: bool = False
    eager: bool = False
    seed: int = 0

    def check(self) -> None:
        """Refuse values that time nothing.

        Raises:
            ConfigError: one sentence that names the option.
        """
        if not self.loads:
            raise ConfigError("--load is missing; give at least one, for example --load 64x16384+512.")
        if self.pool < 1:
            raise ConfigError(f"--pool must hold at least 1 request, got {self.pool}.")
        if self.rate is not None and self.rate <= 0:
            raise ConfigError(f"--rate must be above 0 requests a second, got {self.rate}.")
        limit, need = self.config["max_position_embeddings"], max(x.total for x in self.loads)
        if need > limit:
            raise ConfigError(f"--load needs {need} positions with the output, the shape has {limit}.")
        if need > self.pool * self.loads[0].total:
            raise ConfigError("--pool does not hold one request of every --load; raise it.")

    @property
    def pool_bytes(self) -> int:
        """Bytes of the KV pool."""
        c = self.config
        token = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * shapes.head_size(c) * shapes.ELEMENT
        return int(self.pool * (self.loads[0].total + 32)) * token

    def engine_args(self, row: ServingRow) -> dict[str, Any]:
        """Arguments of `vllm.LLM` for one row."""
        arguments: dict[str, Any] = {
            "load_format": "dummy", "skip_tokenizer_init": True, "dtype": self.config["torch_dtype"],
            "max_model_len": max(x.total for x in self.loads) + 1, "max_num_seqs": self.seqs,
            "max_num_batched_tokens": 8192, "kv_cache_memory_bytes": self.pool_bytes, "enforce_eager": self.eager,
            "disable_log_stats": False, "seed": 0,
        }  # fmt: skip
        if not self.compiled and not self.eager:
            arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        return arguments | row.row.engine_args() | row.extra


def bench_serving(
    plan: ServingPlan,
    rows: list[ServingRow],
    on_row: Callable[[list[dict[str, Any]]], None] = lambda results: None,
    kept: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Serve every load with every row; the first row must be stock.

    `kept` holds results of an earlier run, stock first; their rows are not served again.

    Returns:
        one JSON-ready result a row, with one cell a load; also given to `on_row` after every row.
    """
    from vllm_ext.evaluation.worker import fresh_process

    plan.check()
    results = list(kept)
    known = {r["label"] for r in results}
    for row in [row for row in rows if row.row.label not in known]:
        job = {"plan": dataclasses.asdict(plan), "row": dataclasses.asdict(row), "label": row.row.label}
        results.append(fresh_process("vllm_ext.bench.serving:run_job", job))
        for cell, stock in zip(results[-1]["cells"], results[0]["cells"]):
            cell["ratio"] = cell["tokens_per_s"] / stock["tokens_per_s"]
        on_row(results)
    return results


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Serve the loads of one row in this process."""
    from vllm_ext.evaluation.engine import engine, prepare_process
    from vllm_ext.evaluation.run import describe

    plan = ServingPlan(**job["plan"] | {"loads": tuple(Load(**x) for x in job["plan"]["loads"])})
    row = ServingRow(Row(**job["row"]["row"]), job["row"]["extra"])
    prepare_process()
    began = time.monotonic()
    result: dict[str, Any] = {"label": row.row.label, "options": row.row.options, "extra": row.extra}
    with engine(shapes.model_dir(plan.config), plan.engine_args(row)) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        result["engine"] = describe(llm) | {"start_s": round(time.monotonic() - began, 1)}
        result |= {"pool_bytes": plan.pool_bytes, "pool_tokens": cache.num_gpu_blocks * cache.block_size}
        result |= {"num_blocks": cache.num_gpu_blocks, "block_size": cache.block_size}
        warm = [dataclasses.replace(x, requests=2, output=min(x.output, 600)) for x in plan.loads]
        for load in warm:
            _serve(llm, plan, load, plan.seed + 1)
        result["cells"] = [_serve(llm, plan, load, plan.seed) for load in plan.loads]
    return result


def _serve(llm: Any, plan: ServingPlan, load: Load, seed: int) -> dict[str, Any]:
    """One load: throughput, concurrency, latencies, preemptions, pool usage over time, share of evictions."""
    import numpy as np

    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, plan.config["vocab_size"], size=(load.requests, load.prompt))
    gaps = np.zeros(load.requests) if plan.rate is None else rng.exponential(1 / plan.rate, size=load.requests)
    run = _Run(llm, load, prompts, np.cumsum(gaps).tolist())
    with evictions(llm) as evicted, run.watched():
        run.drain()
    return run.cell() | evicted()


class _Run:
    """Adds requests when they are due and steps the engine core until all are done."""

    def __init__(self, llm: Any, load: Load, prompts: Any, arrivals: list[float]) -> None:
        self.llm, self.load, self.prompts, self.arrivals = llm, load, prompts, arrivals
        self.core = llm.llm_engine.engine_core
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.added: dict[str, float] = {}
        self.preemptions = self.peak = self.done = 0
        self.timeline: list[tuple[float, float, int]] = []
        self.prompt_seconds = 0.0
        self.prompt_tokens = self.step_prompt_tokens = 0

    def drain(self) -> None:
        """Serve the whole load."""
        began = before = time.perf_counter()
        self.began = began
        names: list[str] = []
        while self.done < self.load.requests:
            now = time.perf_counter()
            while len(names) < self.load.requests and self.arrivals[len(names)] <= now - began:
                names.append(self._add(len(names), began))
            if len(names) == self.done:
                time.sleep(0.001)
                continue
            outputs = self.core.get_output()
            now = time.perf_counter()
            self._note(outputs, now, now - before)
            before = now
        self.seconds = time.perf_counter() - began
        self.llm.llm_engine.abort_request(names, internal=True)
        inner = self.core.engine_core
        while inner.scheduler.has_requests() or inner.batch_queue:
            self.core.get_output()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Note how many prompt tokens each finished step computed: a row that only decodes has one token."""
        scheduler = self.core.engine_core.scheduler
        update = scheduler.update_from_output

        def update_from_output(planned: Any, *rest: Any, **more: Any) -> Any:
            self.step_prompt_tokens += sum(n for n in planned.num_scheduled_tokens.values() if n > 1)
            return update(planned, *rest, **more)

        scheduler.update_from_output = update_from_output
        try:
            yield
        finally:
            del scheduler.update_from_output

    def _add(self, i: int, began: float) -> str:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=self.load.output, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": self.prompts[i].tolist()}
        name = self.llm.llm_engine.add_request(f"{self.load.label}-{i}-{id(self)}", prompt, params)
        self.added[name] = began + self.arrivals[i]
        return name

    def _note(self, outputs: Any, now: float, took: float) -> None:
        stats = outputs.scheduler_stats
        for item in outputs.outputs:
            if item.new_token_ids:
                self.first.setdefault(item.request_id, now)
                self.last[item.request_id] = now
            self.done += item.finish_reason is not None
            self.preemptions += sum(e.type.name == "PREEMPTED" for e in item.events or [])
        if stats is None:
            return
        self.peak = max(self.peak, stats.num_running_reqs)
        if self.step_prompt_tokens:
            self.prompt_seconds += took
            self.prompt_tokens += self.step_prompt_tokens
            self.step_prompt_tokens = 0
        if not self.timeline or now - self.began - self.timeline[-1][0] > 0.25:
            self.timeline.append((now - self.began, stats.kv_cache_usage, stats.num_running_reqs))

    def cell(self) -> dict[str, Any]:
        """The measurements, in seconds."""
        ttft = [t - self.added[r] for r, t in self.first.items()]
        tpot = [(t - self.first[r]) / max(1, self.load.output - 1) for r, t in self.last.items()]
        made = self.load.requests * self.load.output
        return {
            "load": self.load.label, "seconds": self.seconds, "tokens_per_s": made / self.seconds,
            "peak_running": self.peak, "preemptions": self.preemptions,
            "prompt_share": self.prompt_seconds / self.seconds, "prompt_tokens": self.prompt_tokens,
            "ttft_p50_s": _at(ttft, 0.5), "ttft_p99_s": _at(ttft, 0.99), "tpot_p50_s": _at(tpot, 0.5),
            "tpot_p99_s": _at(tpot, 0.99), "timeline": [[round(x, 3) for x in point] for point in self.timeline],
            "timeline_columns": ["seconds", "share of the blocks in use", "running requests"],
        }  # fmt: skip


def _at(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return statistics.median(ordered) if share == 0.5 else ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@contextlib.contextmanager
def evictions(llm: Any) -> Iterator[Callable[[], dict[str, Any]]]:
    """Count and time the evictions of an engine in this process; yields what tells the result, {} for stock."""
    import torch

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    builders = [g.get_metadata_builder(0) for groups in worker.model_runner.attn_groups for g in groups]
    compactors = [b.steps.compactor for b in builders if hasattr(getattr(b, "steps", None), "compactor")]
    events: list[tuple[Any, Any]] = []
    before = [dataclasses.replace(c.totals) for c in compactors]
    for compactor in compactors if torch.cuda.is_available() else []:
        compactor._evict = _timed(compactor._evict, events)

    def result() -> dict[str, Any]:
        if not compactors:
            return {}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        done = {
            name: sum(getattr(c.totals, name) - getattr(b, name) for c, b in zip(compactors, before))
            for name in ("compactions", "tokens_kept", "tokens_dropped", "blocks_freed", "seconds")
        }
        device = sum(a.elapsed_time(b) for a, b in events) / 1e3 if torch.cuda.is_available() else None
        return {"evictions": {**done, "host_s": done.pop("seconds"), "device_s": device}}

    try:
        yield result
    finally:
        for compactor in compactors:
            vars(compactor).pop("_evict", None)


def _timed(evict: Callable[..., None], events: list[tuple[Any, Any]]) -> Callable[..., None]:
    import torch

    def timed(*args: Any) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        evict(*args)
        end.record()
        events.append((begin, end))

    return timed


def demand(record: dict[str, Any], cell: dict[str, Any]) -> float:
    """What the requests of a load hold at once in the end, as a share of the stock pool: up to 1 everything fits."""
    load = parse_load(cell["load"])
    return load.requests * load.total / record["results"][0]["pool_tokens"]


def eviction_share(cell: dict[str, Any]) -> float | None:
    """Share of the time that evictions took: on the device, or on the host where that is a CPU; None for stock."""
    found = cell.get("evictions")
    if found is None:
        return None
    return (found["host_s"] if found["device_s"] is None else found["device_s"]) / cell["seconds"]


def serving_table(results: list[dict[str, Any]]) -> Any:
    """A rich table: one line for each load and row."""
    from rich.table import Table

    table = Table(title=f"serving, pool {results[0]['pool_bytes'] / 2**30:.1f} GiB" if results else "serving")
    table.add_column("load")
    table.add_column("row", overflow="fold")
    names = (
        "tok/s",
        "ratio",
        "peak running",
        "preempted",
        "TTFT p50/p99 s",
        "TPOT p50/p99 ms",
        "prompt steps",
        "evicting",
    )
    for name in names:
        table.add_column(name, justify="right")
    for i in range(len(results[0]["cells"]) if results else 0):
        for result in results:
            c, share = result["cells"][i], eviction_share(result["cells"][i])
            evicting = "–" if share is None else f"{share:.1%}"
            table.add_row(
                c["load"], result["label"], f"{c['tokens_per_s']:.0f}", f"{c['ratio']:.2f}x", str(c["peak_running"]),
                str(c["preemptions"]), f"{c['ttft_p50_s']:.1f} / {c['ttft_p99_s']:.1f}",
                f"{c['tpot_p50_s'] * 1e3:.1f} / {c['tpot_p99_s'] * 1e3:.1f}", f"{c['prompt_share']:.0%}", evicting,
            )  # fmt: skip
    return table
