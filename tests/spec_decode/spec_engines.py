"""Engines for the tests of speculation, each set in a process of its own (see `forked`).

Under vLLM 0.32 on CPUs no second engine starts in a process in which numba has been imported; a stock one may come
first.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "attention_backends"))

BASE = {
    "dtype": "float32", "max_model_len": 256, "max_num_seqs": 6, "max_num_batched_tokens": 64, "seed": 0,
    "enforce_eager": True, "skip_tokenizer_init": True, "disable_log_stats": False,
}  # fmt: skip


def use_v2(overflow_checks: bool = True) -> None:
    """Model runner V2 in Triton's interpreter."""
    import v2_on_cpu

    v2_on_cpu.tune_interpreter(overflow_checks)


def repetitive(count: int, vocab: int = 200) -> list[list[int]]:
    """Prompts of many lengths in which look-ups find something; two begin alike (prefix caching)."""
    rnd = random.Random(1)
    made = [
        ([rnd.randrange(5, vocab) for _ in range(rnd.randint(3, 9))] * 99)[: rnd.randint(4, 90)] for _ in range(count)
    ]
    return [*made[:-1], made[0] + [7, 8, 9]]


def note_drafts(scheduler: Any) -> list[list[int]]:
    """Drafts to verify of each decoding request, by step; filled while the scheduler works."""
    steps: list[list[int]] = []
    schedule = scheduler.schedule

    def noted(*args: Any, **kwargs: Any) -> Any:
        decoding = {r.request_id for r in scheduler.running if not r.is_prefill_chunk}
        output = schedule(*args, **kwargs)
        drafted = output.scheduled_spec_decode_tokens
        if counts := [len(drafted.get(r, ())) for r in output.num_scheduled_tokens if r in decoding]:
            steps.append(counts)
        return output

    scheduler.schedule = noted
    return steps


def serve(
    model: str,
    prompts: list[list[int]],
    plugins: dict[str, Any] | None,
    sampling: dict[str, Any] | list[dict[str, Any]],
    rounds: int = 2,
    **extra: Any,
) -> dict[str, Any]:
    """Answers of one engine, what it drafted, and what it published; `sampling` of all prompts, or of each."""
    from vllm import SamplingParams

    import vllm_ext
    from vllm_ext.evaluation.engine import engine

    arguments = BASE | (vllm_ext.engine_args(*plugins, **plugins) if plugins else {}) | extra
    greedy = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, "detokenize": False}
    each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
    params = [SamplingParams(**(greedy | s)) for s in each]
    with engine(model, arguments) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        steps = note_drafts(scheduler)
        texts = [{"prompt_token_ids": p} for p in prompts]
        began = time.monotonic()
        outputs = [llm.generate(texts, params, use_tqdm=False) for _ in range(rounds)]
        seconds = time.monotonic() - began
        found = {m.name: getattr(m, "value", getattr(m, "values", 0)) for m in llm.get_metrics()}
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        rows = getattr(getattr(runner, "speculator", None), "rows", None) or getattr(runner, "drafter", None)
        drafter = getattr(rows, "drafter", None)
        return {
            "tokens": [[[list(c.token_ids) for c in o.outputs] for o in r] for r in outputs],
            "logprobs": [len(c.logprobs or ()) for o in outputs[0] for c in o.outputs],
            "preempted": found.get("vllm:num_preemptions", 0),
            "cached": found.get("vllm:prefix_cache_hits", 0),
            "drafted": found.get("vllm:spec_decode_num_draft_tokens", 0),
            "accepted": found.get("vllm:spec_decode_num_accepted_tokens", 0),
            "seconds": seconds,
            "decoded": sum(map(len, steps)),
            "counted": None if drafter is None else drafter.counters.sum(0).tolist(),
            "scheduled": None if (c := getattr(scheduler, "spec_counters", None)) is None else c.totals[0].tolist(),
            "left": None if drafter is None else len(drafter.running()),
            "runner": type(runner).__module__,
            "mixed": sum(0 in counts and max(counts) > 0 for counts in steps),
            "counts": max(len(set(counts)) for counts in steps),
        }


def answers(
    model: str, runner: str, plugins: dict[str, Any] | None, sampling: dict[str, Any], extra: dict[str, Any]
) -> dict[str, Any]:
    """Seven prompts twice, with plugins or without."""
    if runner == "v2":
        use_v2(overflow_checks=plugins is not None)
    return serve(model, repetitive(7), plugins, sampling, **extra)


def real(model: str, runner: str, plugins: dict[str, Any], count: int, prompt: int, output: int) -> dict[str, Any]:
    """The first `prompt` tokens of the benchmark's prompts, `count` of them, without and with plugins, in fp32."""
    if runner == "v2":
        use_v2(overflow_checks=False)
    from transformers import AutoTokenizer

    from vllm_ext.bench.spec_loads import prompts

    tokenizer, loads = AutoTokenizer.from_pretrained(model), ("edit", "summary", "chat", "agent")
    texts = [p[:prompt] for load in loads for p in prompts(load, tokenizer, count // len(loads), 0)]
    sampling = {"max_tokens": output}
    return {name: serve(model, texts, p, sampling, rounds=1) for name, p in (("stock", None), ("with", plugins))}


def full(model: str, runner: str, plugins: dict[str, Any] | None, output: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Twenty greedy prompts of 16 to 92 tokens, and four sampled requests among them, on SmolLM2 in fp32."""
    if runner == "v2":
        use_v2(overflow_checks=False)
    from transformers import AutoTokenizer

    from vllm_ext.bench.spec_loads import prompts

    tokenizer, loads = AutoTokenizer.from_pretrained(model), ("edit", "summary", "chat", "agent")
    made = {load: prompts(load, tokenizer, 5, 0) for load in loads}
    texts = [made[loads[i % 4]][i // 4][: 16 + 4 * i] for i in range(20)]
    sampling = [{"max_tokens": output}] * 20
    for at in (4, 9, 14, 19):
        texts.insert(at, texts[at])
        sampling.insert(at, {"max_tokens": 40, "temperature": 0.8})
    found = serve(model, texts, plugins, sampling, rounds=1, **extra)
    kept = [i for i, s in enumerate(sampling) if "temperature" not in s]
    return found | {"prompts": [texts[i] for i in kept], "tokens": [found["tokens"][0][i][0] for i in kept]}
