"""An engine with a drafter and a rule, or without speculation, in a process of its own. Only for tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "attention_backends")]


def requests(output: int, seeded: bool) -> tuple[list[dict[str, Any]], list[Any]]:
    """Prompts that repeat themselves, of mixed lengths; greedy, seeded and truncated sampling in one batch."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [11 + i, 7, 300 - i, 45, 23] * (2 + i)} for i in range(6)]
    cut = {} if seeded else {"top_k": 20, "top_p": 0.9}  # V2's kernel for these does not run in the interpreter
    common = {"max_tokens": output, "ignore_eos": True, "detokenize": False}
    params = [
        SamplingParams(temperature=0.0, **common),
        SamplingParams(temperature=1.0, seed=1 if seeded else None, **common),
        SamplingParams(temperature=0.0, repetition_penalty=1.2, **common),
        SamplingParams(temperature=0.7, seed=2 if seeded else None, **cut, **common),
        SamplingParams(temperature=0.0, logprobs=2, **common),
        SamplingParams(temperature=1.3, min_tokens=3, **common),
    ]
    return prompts, params


def run(runner: str, model: str, plugins: dict[str, Any], output: int) -> dict[str, Any]:
    """Tokens of an engine, and with plugins what was drafted and accepted; `output` is in tokens."""
    if runner == "v2":
        from spec_engines import use_v2

        use_v2()
    import vllm_ext
    from vllm_ext.evaluation.engine import engine

    base = {
        "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64, "enforce_eager": True, "seed": 0,
        "dtype": "float32", "skip_tokenizer_init": True, "disable_log_stats": False,
    }  # fmt: skip
    # vLLM cannot take a seeded request through a chunked prefill under V1 on a CPU
    prompts, params = requests(output, seeded=runner == "v2")
    extra = vllm_ext.engine_args(*plugins, **plugins) if plugins else {}
    with engine(model, base | extra) as llm:
        running = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        tokens = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]
        found = {"tokens": tokens, "runner": type(running).__module__}
        if plugins:
            counters = {m.name.removeprefix("vllm:spec_decode_"): getattr(m, "value", 0) for m in llm.get_metrics()}
            found |= {k: counters[k] for k in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")}
            found["sampler"] = type(running.rejection_sampler).__module__
    return found


def start(runner: str, model: Path, plugins: dict[str, Any], output: int) -> dict[str, Any]:
    """`run` in a process of its own."""
    from forked import call

    env = {"TRITON_INTERPRET": None} if runner == "v1" else {}
    return call(runner, Path(__file__), "run", runner, str(model), plugins, output, **env)
