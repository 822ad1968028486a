"""One eviction at start, in the null block: kernels are compiled before the first request has to wait for them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from vllm_ext.kv_managers.compactor import Totals
from vllm_ext.kv_managers.rows import Row

if TYPE_CHECKING:
    from vllm_ext.kv_managers.support import Steps

REQUEST = "vllm-ext warm-up"
LONG = 5000
"""Tokens of a prompt for which the kernels of long prompts run."""


def attach(worker: Any) -> None:
    """Evict once after vLLM's own warm-up."""
    original = worker.compile_or_warm_up_model

    @functools.wraps(original)
    def compile_or_warm_up_model(*args: Any, **kwargs: Any) -> Any:
        done = original(*args, **kwargs)
        for groups in worker.model_runner.attn_groups:
            for group in groups:
                steps = getattr(group.get_metadata_builder(0), "steps", None)
                if steps is not None:
                    run(steps, worker.model_runner, worker.vllm_config.model_config.max_model_len)
        return done

    worker.compile_or_warm_up_model = compile_or_warm_up_model


def prompts(steps: Steps, longest: int) -> list[int]:
    """The shortest and the longest prompt that are worth an eviction here, if any is."""
    counts = steps.counts
    least = counts.kept(1) + 2 * counts.method.block_size
    found = []
    for prompt in (least, 2 * least, 4 * least, LONG):
        first = counts.first_event(prompt)
        if first is not None and first < longest:
            found.append(prompt)
    return found[:1] + found[-1:] if len(found) > 1 else found


def run(steps: Steps, runner: Any, longest: int) -> None:
    """Evict requests whose blocks are all the null block; its content is restored."""
    compactor = steps.compactor
    compactor.layers = steps.layers(runner)
    null = [layer.cache[0] for layer in compactor.layers]
    saved = [x.clone() for x in null]
    for x in null:
        x.normal_()
    for prompt in prompts(steps, longest):
        first = steps.counts.first_event(prompt)
        assert first is not None
        blocks = torch.zeros(first // steps.counts.method.block_size + 2, dtype=torch.int32, device=null[0].device)
        table = functools.partial(blocks.view, -1)  # what asks for the blocks gets these
        row = Row(REQUEST, 0, first, prompt)
        compactor.begin(row, table)
        if steps.counts.method.needs_queries:
            ring, *_ = compactor.record_range(row)
            for layer in compactor.layers:
                if layer.ring is not None:
                    layer.ring[ring].zero_()
        compactor.begin(Row(REQUEST, first, first + 1, prompt), table)
        compactor.forget(set())
    for x, old in zip(null, saved):
        x.copy_(old)
    compactor.totals = Totals()
