"""Which request each row of a batch belongs to, from either of vLLM's model runners."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

_worker: weakref.ref[Any] | None = None


class Row(NamedTuple):
    """One row of a batch: its request, tokens computed before and after this step, tokens of the prompt."""

    request: str
    before: int
    after: int
    prompt: int


def bind(worker: Any) -> None:
    """Remember the worker of this process; its model runner knows the requests."""
    global _worker
    _worker = weakref.ref(worker)


def runner() -> Any:
    """The model runner of this process."""
    worker = _worker() if _worker is not None else None
    if worker is None:
        raise RuntimeError("vllm-ext: no worker is bound; KV plugins need vLLM's own worker classes.")
    return worker.model_runner


def read(common: Any, model_runner: Any) -> list[Row | None]:
    """The rows of a batch in order; None for padding and for the dummy batches of warm-up.

    Args:
        common: CommonAttentionMetadata of the step.
        model_runner: V1's or V2's.
    """
    starts = common.query_start_loc_cpu.tolist()
    ends = common.seq_lens_cpu_upper_bound.tolist()
    states = getattr(model_runner, "req_states", None)
    if states is not None:  # V2
        known, prompts = states.index_to_req_id, states.prompt_len.np
        slots = [] if common.req_idx is None else common.req_idx.tolist()
        named = [(known.get(i), int(prompts[i])) for i in slots]
    else:
        batch = model_runner.input_batch
        named = list(zip(batch.req_ids, batch.num_prompt_tokens.tolist()))
    rows: list[Row | None] = [None] * common.num_reqs
    for r, (request, prompt) in enumerate(named[: common.num_reqs]):
        scheduled = starts[r + 1] - starts[r]
        if request is not None and scheduled > 0:
            rows[r] = Row(request, ends[r] - scheduled, ends[r], prompt)
    return rows


def live(model_runner: Any) -> set[str]:
    """Requests that the runner knows."""
    states = getattr(model_runner, "req_states", None)
    return set(states.req_id_to_index) if states is not None else set(model_runner.requests)
