"""Time of every verification rule on random laws, beside vLLM's own kernels for model runner V2. CUDA only.

The byte floor is one read of the target's draft rows and one of a row to draw from, and the same of the draft law where
there is one, at the measured copy bandwidth.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

from vllm_ext.options import ConfigError

REPEATS = 40


def make_batch(requests: int, drafts: int, vocab: int, sampled: bool) -> Any:
    """A step of `requests` x `drafts` drafts; target fp32, draft logits bf16, drafts drawn from their law."""
    import torch

    from vllm_ext.spec_decode.protocols import VerifyBatch

    torch.manual_seed(0)
    rows = requests * (drafts + 1)
    logits = 2 * torch.randn(rows, vocab, device="cuda")
    slots = torch.arange(requests, device="cuda")
    draft_logits = logits.view(requests, drafts + 1, vocab)[:, :drafts] + torch.randn(
        requests, drafts, vocab, device="cuda"
    )
    draft_logits = draft_logits.to(torch.bfloat16)
    drawn = torch.multinomial(draft_logits.float().flatten(0, 1).softmax(1), 1).view(requests, drafts)
    tokens = torch.full((requests, drafts + 1), -1, dtype=torch.int64, device="cuda")
    tokens[:, :drafts] = drawn if sampled else logits.view(requests, drafts + 1, vocab)[:, :drafts].argmax(2)
    source = torch.full_like(tokens, -1)
    source[:, :drafts] = torch.arange(requests * drafts, device="cuda").view(requests, drafts)
    return VerifyBatch(
        logits=logits,
        drafts=tokens.flatten(),
        cu_rows=torch.arange(requests + 1, device="cuda", dtype=torch.int32) * (drafts + 1),
        row_request=slots.repeat_interleave(drafts + 1).int(),
        temperature=torch.ones(requests, device="cuda"),
        seeds=torch.randint(2**62, (requests,), device="cuda"),
        positions=torch.arange(drafts + 1, device="cuda").repeat(requests) + 100,
        draft_logits=draft_logits.flatten(0, 1) if sampled else None,
        draft_row=source.flatten() if sampled else None,
        draft_temperature=torch.ones(requests, device="cuda"),
        max_drafts=drafts,
    )


def stock(batch: Any, block: bool) -> Callable[[], Any]:
    """vLLM's rejection sampling on the same step."""
    import torch
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    requests, k = batch.cu_rows.shape[0] - 1, batch.max_drafts
    slots = torch.arange(requests, device="cuda", dtype=torch.int32)
    step = torch.arange(k + 1, device="cuda", dtype=torch.int32).repeat(requests)
    inputs = batch.drafts.roll(1)
    draft_logits = None if batch.draft_logits is None else batch.draft_logits.view(requests, k, -1)

    def call() -> Any:
        return rejection_sample(
            batch.logits, draft_logits, inputs, batch.cu_rows, batch.positions, slots, batch.row_request, step,
            batch.temperature, batch.seeds, k, use_block_verification=block,
        )  # fmt: skip

    return call


def run(batches: tuple[int, ...], drafts: int, vocab: int) -> list[dict[str, Any]]:
    """One result a batch, kind of drafts and rule.

    Raises:
        ConfigError: there is no CUDA device.
    """
    import torch

    from vllm_ext.bench.shapes import copy_bandwidth
    from vllm_ext.kernels.spec_rules import Rule
    from vllm_ext.kernels.spec_verify import verify

    if not torch.cuda.is_available():
        raise ConfigError("vllm-ext bench verify needs a CUDA device; there is none here.")
    rules = {
        "ratio": Rule("ratio"), "hsd": Rule("hsd"), "cactus": Rule("cactus"), "fly": Rule("fly"),
        "cactus, enforced": Rule("cactus", exact=True), "fly, top3": Rule("fly", entropy="top3"),
    }  # fmt: skip
    bandwidth, results = copy_bandwidth(), []
    for requests in batches:
        for sampled in (False, True):
            batch = make_batch(requests, drafts, vocab, sampled)
            calls = {f"vLLM, {n}": stock(batch, n == "block") for n in ("standard", "block")}
            calls |= {name: functools.partial(verify, rule, batch) for name, rule in rules.items()}
            for name, call in calls.items():
                law = sampled and not name.startswith("fly")
                floor = requests * (drafts + 1) * vocab * (4 + 2 * law) / bandwidth
                emitted = float(call()[1].float().mean())
                results.append(
                    {"batch": requests, "sampled": sampled, "rule": name, "emitted": emitted, "floor_us": 1e6 * floor}
                    | _times(call)
                )
    return results


def _times(call: Callable[[], Any]) -> dict[str, float]:
    """Medians in microseconds: on the device (graph replay), and of the host while it launches."""
    import torch

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    host = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        host.append(time.perf_counter() - began)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    device = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        device.append(begin.elapsed_time(end) * 1e3)
    return {"device_us": statistics.median(device), "host_us": 1e6 * statistics.median(host)}
