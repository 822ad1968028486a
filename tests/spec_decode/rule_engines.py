"""An engine without speculation and one with drafter and rule, same requests, in a process of its own. Only for tests.

python -P rule_engines.py JSON     {"runner": "v1" | "v2", "model": DIR, "plugins": {...}, "output": tokens}
"""

from __future__ import annotations

import json
import os
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


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens of both engines, and what was drafted and accepted."""
    import vllm_ext
    from vllm_ext.evaluation.engine import engine

    base = {
        "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64, "enforce_eager": True, "seed": 0,
        "dtype": "float32", "skip_tokenizer_init": True, "disable_log_stats": False,
    }  # fmt: skip
    # vLLM cannot take a seeded request through a chunked prefill under V1 on a CPU
    prompts, params = requests(job["output"], seeded=job["runner"] == "v2")
    found: dict[str, Any] = {}
    for name, plugins in (("stock", {}), ("rule", job["plugins"])):
        extra = vllm_ext.engine_args(*plugins, **plugins) if plugins else {}
        with engine(job["model"], base | extra) as llm:
            runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
            out = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]
            found[name] = {"tokens": out, "runner": type(runner).__module__}
            if plugins:
                counters = {m.name.removeprefix("vllm:spec_decode_"): getattr(m, "value", 0) for m in llm.get_metrics()}
                found |= {k: counters[k] for k in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")}
                found["sampler"] = type(runner.rejection_sampler).__module__
    return found


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if given["runner"] == "v2" else "0"
    if given["runner"] == "v2":
        from spec_engines import use_v2

        use_v2()  # before vLLM
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    print("RESULT " + json.dumps(run(given)))
