"""Real CPU engines for the tests: start, generate, and look at the cache, the pool and the counters inside."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

PAGE = 32
TIE = 1e-3
"""Log-probabilities closer than this may change places between two orders of fp32 summation."""

BASE = {
    "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 256, "seed": 0,
    "enforce_eager": True, "skip_tokenizer_init": True, "block_size": PAGE, "num_gpu_blocks_override": 400,
}  # fmt: skip
COVERING = {"page_size": PAGE, "budget": 1024, "dense_below": 0, "dense_layers": [1]}
"""Lists that hold every page of a request of `max_model_len` tokens: the sparse path runs and must equal dense."""
SPARSE = COVERING | {"budget": 5 * PAGE}


@contextlib.contextmanager
def start(model: Path | str, plugin: dict[str, dict[str, Any]] | None = None, **extra: Any) -> Iterator[Any]:
    """An engine in this process; `plugin` maps one plugin to its options, None is stock."""
    import vllm_ext
    from vllm_ext.evaluation.engine import engine

    ours = vllm_ext.engine_args(*plugin, **plugin) if plugin else {}
    with engine(model, BASE | ours | extra) as llm:
        yield llm


def tokens(rnd: random.Random, n: int, vocab: int = 256) -> list[int]:
    """A random prompt."""
    return [rnd.randrange(vocab) for _ in range(n)]


def outputs(llm: Any, prompts: Sequence[list[int]], max_tokens: int | Sequence[int], **params: Any) -> list[Any]:
    """Greedy request outputs, end-of-sequence ignored; `max_tokens` for all, or one a prompt."""
    from vllm import SamplingParams

    counts = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    fixed = {"temperature": 0.0, "ignore_eos": True, "detokenize": False} | params
    sampling = [SamplingParams(max_tokens=n, **fixed) for n in counts]
    return llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)


def generate(llm: Any, prompts: Sequence[list[int]], max_tokens: int | Sequence[int], **params: Any) -> list[list[int]]:
    """Token ids of `outputs`."""
    return [list(o.outputs[0].token_ids) for o in outputs(llm, prompts, max_tokens, **params)]


def core(llm: Any) -> Any:
    """The engine core."""
    return llm.llm_engine.engine_core.engine_core


def runner(llm: Any) -> Any:
    """The model runner."""
    return core(llm).model_executor.driver_worker.worker.model_runner


def groups(llm: Any) -> list[Any]:
    """Attention groups of the model runner."""
    return [g for found in runner(llm).attn_groups for g in found]


def counters(llm: Any) -> dict[str, int]:
    """Totals of the sparse backend by name, summed over attention groups."""
    from vllm_ext.metrics import NAMES

    parts = [g.get_metadata_builder(0).counters.totals() for g in groups(llm)]
    return {name: sum(p[i] for p in parts) for i, name in enumerate(NAMES)}


def pool(llm: Any) -> Any:
    """The block pool of the scheduler."""
    return core(llm).scheduler.kv_cache_manager.block_pool


def leaked(llm: Any) -> int:
    """Blocks in use, the null block apart; 0 when no request is alive."""
    return pool(llm).num_gpu_blocks - 1 - pool(llm).get_num_free_blocks()


def layers(llm: Any) -> dict[str, Any]:
    """Attention layers by name, in model order."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    return get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention)


def sparse_layers(llm: Any) -> dict[str, Any]:
    """Layers whose decode steps read a list of pages."""
    return {name: layer for name, layer in layers(llm).items() if getattr(layer.impl, "method", None) is not None}


def complete_pages(llm: Any) -> list[int]:
    """Blocks that hold a complete page: those in the prefix cache, and the full ones of live requests."""
    pages = {b.block_id for b in pool(llm).blocks if b.block_hash is not None}
    scheduler = core(llm).scheduler
    for request in scheduler.running:
        [blocks] = scheduler.kv_cache_manager.get_blocks(request.request_id).get_block_ids()
        pages |= set(blocks[: request.num_computed_tokens // PAGE])
    return sorted(pages)


def wrong_records(llm: Any) -> tuple[list[str], int]:
    """Compare every index record with the one rebuilt from the page's keys: (what differs, pages compared)."""
    from vllm_ext.attention_backends.cpu_backend import cache_views
    from vllm_ext.attention_backends.support import index_view
    from vllm_ext.kernels import reference, reference_clusters

    pages = complete_pages(llm)
    wrong = []
    for name, layer in sparse_layers(llm).items():
        cache, method = layer.kv_cache, layer.impl.method
        keys, _ = cache_views(cache)
        index = index_view(cache, method, layer.impl.head_size)
        assert index is not None
        if getattr(method, "clusters", 0):
            rebuilt = reference_clusters.record(keys[pages], method.clusters, method.iterations)
        else:
            rebuilt = reference.index_record(keys[pages], method.index)
        same = (index[pages] == rebuilt).flatten(1).all(1)
        wrong += [f"{name}: page {page}" for page, ok in zip(pages, same.tolist()) if not ok]
        assert torch.isfinite(index[pages]).all()
    return wrong, len(pages)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where two outputs part; None if the shorter is a beginning of the longer."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)


def is_tie(stock: Any, prompt: list[int], want: Sequence[int], got: Sequence[int]) -> bool:
    """Whether a stock engine holds the first differing tokens of two outputs within TIE of each other."""
    at = first_difference(want, got)
    assert at is not None
    [out] = outputs(stock, [prompt + list(want[:at])], 1, logprobs=5)
    seen = out.outputs[0].logprobs[0]
    return want[at] in seen and got[at] in seen and abs(seen[want[at]].logprob - seen[got[at]].logprob) < TIE
