"""Seconds of a step by batch, drafts a request and context, for the length policy `cast`: measured in a real engine.

One engine with the drafter that will be served; the number of drafts is switched between windows of steps of the same
batch. Whether drafts are accepted does not change what a step costs. Times are those between the engine core's results.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm_ext.bench import spec_engine
from vllm_ext.evaluation.rows import Row, parse_row
from vllm_ext.options import ConfigError

SETTLE = 4
"""Steps after a switch that are not timed: with asynchronous scheduling a choice holds from the step after next."""


@dataclass(frozen=True)
class CostPlan:
    """What to time.

    Attributes:
        model: directory of the target model.
        drafter: the drafter's row, e.g. `suffix_automaton`.
        batches, drafts, contexts: the axes; drafts start at 0.
        steps: timed steps of a cell.
        eager: of the engine.
        kv_memory: GiB of the KV pool.
    """

    model: str
    drafter: str
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    drafts: tuple[int, ...] = (0, 2, 4, 7)
    contexts: tuple[int, ...] = (512,)
    steps: int = 16
    eager: bool = False
    kv_memory: float = 8.0

    def row(self) -> Row:
        """The engine's plugins: the drafter, and fixed lengths that are switched from outside.

        Raises:
            ConfigError: axes that are no axes, or a drafter that does not reach the longest draft.
        """
        for name, axis in (("batch", self.batches), ("drafts", self.drafts), ("context", self.contexts)):
            if list(axis) != sorted(set(axis)) or axis[0] < (name != "drafts"):
                raise ConfigError(f"--{name} must be different ascending numbers, got {', '.join(map(str, axis))}.")
        if self.drafts[0] != 0 or len(self.drafts) < 2:
            raise ConfigError(
                "--drafts must hold 0 and one more number: a step without drafts is what others are held to."
            )
        row = parse_row(self.drafter)
        plugins = list(row.plugins().values())
        if len(plugins) != 1:
            raise ConfigError(f"--drafter names one drafter, not {len(plugins)} plugins; got '{self.drafter}'.")
        [drafter] = plugins
        most = getattr(drafter, "num_speculative_tokens", None)
        if most is None:
            raise ConfigError(f"--drafter {drafter.name} is no drafter; take e.g. suffix_automaton.")
        if most < self.drafts[-1]:
            raise ConfigError(
                f"--drafts reaches {self.drafts[-1]}, but {drafter.name}.num_speculative_tokens is {most}; raise that."
            )
        lengths = {"drafts": self.drafts[-1], "lengths": list(self.drafts)}
        return Row(self.drafter, row.options | {"fixed": lengths})

    @property
    def output(self) -> int:
        """Most tokens that a request can emit."""
        waiting = 2 * self.batches[-1] + 8
        return sum((SETTLE + self.steps + waiting) * (k + 1) for k in self.drafts) + waiting


def measure(plan: CostPlan, advance: Callable[[str, int, int], None] = lambda *_: None) -> dict[str, Any]:
    """The table as `vllm_ext.spec_decode.draft_length.read_table` reads it, with spread and drafts verified."""
    from vllm_ext.evaluation.engine import engine, prepare_process

    row = plan.row()
    prepare_process()
    sizes = spec_engine.graph_sizes(plan.batches, sorted(spec_engine.drafts(row)))
    arguments = spec_engine.engine_args(plan.batches, sizes, plan.kv_memory, plan.eager)
    arguments |= {"max_model_len": _model_length(plan), "skip_tokenizer_init": True} | row.engine_args()
    with spec_engine.one_compiled_model(), engine(plan.model, arguments) as llm:
        cells = [[_cells(llm, plan, c, b, advance) for b in plan.batches] for c in plan.contexts]
        about = _about(llm, plan)
    pick = {name: [[[cell[name] for cell in b] for b in c] for c in cells] for name in ("seconds", "iqr", "drafted")}
    axes = {"batch": list(plan.batches), "drafts": list(plan.drafts), "context": list(plan.contexts)}
    return about | axes | pick


def _model_length(plan: CostPlan) -> int:
    """As in `bench spec`, which then finds the same compiled model, if that is enough and the model takes so much."""
    from vllm_ext.evaluation.engine import check_model

    need, most = plan.contexts[-1] + plan.output, check_model(plan.model).get("max_position_embeddings", 0)
    return spec_engine.MODEL_LENGTH if need <= spec_engine.MODEL_LENGTH <= most else need


def _about(llm: Any, plan: CostPlan) -> dict[str, Any]:
    from vllm.platforms import current_platform

    from vllm_ext.evaluation.run import describe
    from vllm_ext.spec_decode.draft_length import model_shape

    config = llm.llm_engine.vllm_config
    return {
        "device": current_platform.get_device_name(),
        "model": model_shape(config.model_config.hf_text_config),
        "drafter": plan.drafter,
        "engine": describe(llm),
    }


def _cells(llm: Any, plan: CostPlan, context: int, batch: int, advance: Callable[..., None]) -> list[dict[str, Any]]:
    """Times of one batch and context, for every number of drafts."""
    from vllm_ext.spec_decode.draft_length import FixedPolicy

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    policy = scheduler.spec_policy
    if not isinstance(policy, FixedPolicy):
        raise RuntimeError(f"the scheduler follows {type(policy).__name__}, not fixed lengths.")
    exact = llm.llm_engine.vllm_config.use_v2_model_runner  # V1 verifies fewer where a drafter finds nothing
    cells = []
    with _requests(llm, plan, context, batch) as step:
        for done, k in enumerate(plan.drafts):
            policy.drafts = k
            cells.append(_cell(step, plan, batch, k, exact))
            advance(f"{batch}x{context}", done + 1, len(plan.drafts))
    return cells


def _cell(step: Callable[[], Any], plan: CostPlan, batch: int, k: int, exact: bool) -> dict[str, Any]:
    """Median seconds of a step of the whole batch with k drafts a request."""
    for _ in range(SETTLE):
        step()
    times, drafted, last = [], [], time.perf_counter()
    for _ in range(40 * plan.steps):
        outputs = step()
        if not outputs.outputs:
            continue  # a step was queued
        now = time.perf_counter()
        gap, last = now - last, now
        if any(item.finish_reason is not None for item in outputs.outputs):
            raise RuntimeError("a request ended while it was timed.")
        if len(outputs.outputs) < batch:
            continue  # not all are decoding yet
        stats = outputs.scheduler_stats
        spec = stats.spec_decoding_stats if stats is not None else None
        verified = spec.num_draft_tokens / batch if spec is not None else 0.0
        if verified > k or (exact and verified != k):
            continue  # drafts of before the switch
        times.append(gap)
        drafted.append(verified)
        if len(times) == plan.steps:
            break
    if len(times) < plan.steps:
        raise RuntimeError(f"only {len(times)} of {plan.steps} steps of {batch} requests verified {k} drafts each.")
    quartiles = statistics.quantiles(times, n=4)
    return {
        "seconds": statistics.median(times),
        "iqr": [quartiles[0], quartiles[2]],
        "drafted": statistics.mean(drafted),
    }


@contextlib.contextmanager
def _requests(llm: Any, plan: CostPlan, context: int, batch: int) -> Iterator[Callable[[], Any]]:
    """Add the batch, wait until all of it decodes, yield one step of the engine core; abort the batch afterwards."""
    import numpy as np
    from vllm import SamplingParams

    engine = llm.llm_engine
    vocab = engine.vllm_config.model_config.get_vocab_size()
    params = SamplingParams(temperature=0.0, max_tokens=plan.output, ignore_eos=True, detokenize=False)
    prompts = np.random.default_rng(0).integers(vocab // 2, size=(batch, context))
    names = [f"{batch}x{context}-{i}" for i in range(batch)]
    ids = [engine.add_request(n, {"prompt_token_ids": p.tolist()}, params) for n, p in zip(names, prompts)]
    core = engine.engine_core
    try:
        seen = 0
        while seen < 2:
            seen += len(core.get_output().outputs) == batch
        yield core.get_output
    finally:
        engine.abort_request(ids, internal=True)
        while core.engine_core.scheduler.has_requests() or core.engine_core.batch_queue:
            core.get_output()
