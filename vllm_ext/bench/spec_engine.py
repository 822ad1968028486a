"""Engines of the speculation benchmarks: one compiled model, the same CUDA graphs and KV pool for every row.

Left to itself vLLM sizes graphs by the number of drafts (at most 64 tokens without speculation, 512 with 7 drafts at 32
requests), so that rows would differ in how many of their steps run without a graph; and it compiles the model and every
Triton kernel anew for each row, because the drafter is part of the name that it caches both under.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_ext.evaluation.rows import Row

METHODS = ("ngram", "ngram_gpu", "suffix", "draft_model", "custom_class")
"""vLLM's speculative methods that take nothing from inside the target model: its layers are those of no speculation."""
KINDS = ("drafter", "verifier", "length")
"""Kinds of plugins that change no layer."""
MODEL_LENGTH = 4096
"""Tokens of a request, prompt and answer; part of the name that vLLM caches a compiled model under."""
GRAPH_TOKENS = 1280
"""Most tokens of a captured step: 32 decoding requests with 8 drafts each beside a prompt of some 900 tokens."""


def drafts(row: Row) -> set[int]:
    """Drafts a request and step that a row of plugins decodes with: its most, and what a length policy chooses from."""
    plugins = list(row.plugins().values())
    most = max((getattr(p, "num_speculative_tokens", 0) for p in plugins), default=0)
    return {most}.union(*(p.choices(most) for p in plugins if p.kind == "length"))


def graph_sizes(batches: Sequence[int], drafts: Sequence[int]) -> list[int]:
    """Tokens of the steps to capture, ascending: decoding with each number of drafts, and beside prompts.

    Args:
        batches: requests in flight.
        drafts: what `drafts` says of the rows.
    """
    most = max(batches)
    counts = {n for n in (1, 2, 4, *range(8, most, 8), *batches) if n <= most}
    sizes = {n * (k + 1) for n in counts for k in {0, *drafts}}
    return sorted(sizes | {*range(64, 512, 64), *range(512, GRAPH_TOKENS + 1, 128)})


def engine_args(batches: Sequence[int], sizes: Sequence[int], kv_gib: float, eager: bool) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that no row may change.

    Args:
        sizes: see `graph_sizes`.
        kv_gib: the KV pool, GiB; given in bytes, vLLM does not capture all graphs once more to measure their memory.
    """
    arguments: dict[str, Any] = {
        "max_num_seqs": max(batches),
        "kv_cache_memory_bytes": int(kv_gib * 2**30),
        "gpu_memory_utilization": 0.01,  # only asked whether so much is free: others may be using the GPU
        "enforce_eager": eager,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    if not eager:
        arguments["compilation_config"] = {"cudagraph_capture_sizes": list(sizes)}
    return arguments


@contextlib.contextmanager
def one_compiled_model() -> Iterator[None]:
    """Within it, engines that differ in how they draft and verify find each other's compiled model."""
    from vllm.config import VllmConfig

    own = VllmConfig.compute_hash

    def compute_hash(self: Any, *args: Any, **kwargs: Any) -> str:
        if not _same_layers(self):
            return own(self, *args, **kwargs)
        graphs, ranks = self.compilation_config, self.parallel_config
        hidden: list[tuple[Any, str, Any]] = [(self, "speculative_config", None), (self, "additional_config", {})]
        hidden += [(graphs, name, None) for name in ("cudagraph_capture_sizes", "max_cudagraph_capture_size")]
        if ranks.world_size_across_dp == 1:
            hidden.append((ranks, "disable_nccl_for_dp_synchronization", None))  # follows asynchronous scheduling
        given = [getattr(owner, name) for owner, name, _ in hidden]
        try:
            for owner, name, value in hidden:
                setattr(owner, name, value)
            return own(self, *args, **kwargs)
        finally:
            for (owner, name, _), value in zip(hidden, given):
                setattr(owner, name, value)

    VllmConfig.compute_hash = compute_hash
    try:
        yield
    finally:
        VllmConfig.compute_hash = own


def _same_layers(config: Any) -> bool:
    """Does the model of an engine have the layers of no speculation?"""
    from vllm_ext import catalogue

    speculation, given = config.speculative_config, config.additional_config or {}
    if speculation is not None and speculation.method not in METHODS:
        return False
    if not isinstance(given, dict) or set(given) - {"vllm_ext"}:
        return False
    return all(catalogue.get(name).kind in KINDS for name in given.get("vllm_ext", {}))
