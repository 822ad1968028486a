"""Eviction under model runner V2 on a CPU, in a process of its own: the shim must come before vLLM."""

from __future__ import annotations

import random
from typing import Any

import v2_on_cpu
from kv_engines import compactor, generate, leaked, manager, outputs, runner, start, tokens


def run(model: str, plugins: dict[str, dict[str, Any]], lengths: list[int], output: int) -> dict[str, Any]:
    """Stock and each plugin, two rounds of the same prompts."""
    v2_on_cpu.tune_interpreter(overflow_checks=False)  # the kernels that run are vLLM's
    rnd = random.Random(0)
    prompts = [tokens(rnd, n) for n in lengths]
    found: dict[str, Any] = {}
    for name, plugin in [("stock", None), *((n, {n.partition(" ")[0]: o}) for n, o in plugins.items())]:
        with start(model, plugin, max_num_batched_tokens=128, max_num_seqs=8) as llm:
            first = generate(llm, prompts, output)
            again = outputs(llm, prompts, output)
            found[name] = {
                "runner": type(runner(llm)).__module__,
                "first": first,
                "again": [list(o.outputs[0].token_ids) for o in again],
                "cached": [o.num_cached_tokens for o in again],
                "leaked": leaked(llm),
            }
            if plugin:
                found[name] |= {"evictions": compactor(llm).totals.compactions, "freed": manager(llm).blocks_freed}
    return found
