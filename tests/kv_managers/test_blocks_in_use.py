"""Memory: blocks that evictions leave to others, bytes beside the cache; servers without plugins run stock code."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kv_engines import compactor, core, generate, layers, pool, start, tokens

PROMPT, OUTPUT, REQUESTS = 200, 120, 8
ROOT = Path(__file__).parents[2]
FOLDERS = ("vllm_ext", "kv_managers", "attention_backends", "kernels", "spec_decode")


def used_blocks(llm: Any) -> list[int]:
    """Blocks in use after every step in which all requests run."""
    rnd, seen = random.Random(11), []
    scheduler = core(llm).scheduler
    update = scheduler.update_from_output

    def noting(*a: Any, **k: Any) -> Any:
        if len(scheduler.running) == REQUESTS:
            seen.append(pool(llm).num_gpu_blocks - 1 - pool(llm).get_num_free_blocks())
        return update(*a, **k)

    scheduler.update_from_output = noting
    try:
        generate(llm, [tokens(rnd, PROMPT) for _ in range(REQUESTS)], OUTPUT)
    finally:
        del scheduler.update_from_output
    return seen


def our_files(run: Any) -> set[str]:
    """Files of this package whose functions a call enters."""
    found: set[str] = set()

    def note(frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            found.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return {f for f in found if f.startswith(tuple(f"{ROOT / x}/" for x in FOLDERS))}


@pytest.mark.engine
def test_blocks_in_use_fall_as_planned_and_stock_steps_run_none_of_our_code(tiny_model: Path) -> None:
    """The pool is allocated as a whole at start, so blocks in use are the memory that other requests can have."""
    most = {"max_num_batched_tokens": 256, "enable_prefix_caching": False}
    with start(tiny_model, None, **most) as llm:
        stock = used_blocks(llm)
        assert our_files(lambda: generate(llm, [tokens(random.Random(1), PROMPT)], 4)) == set()
    with start(tiny_model, {"r_kv": {"budget": 64, "stride": 32, "window": 8}}, **most) as llm:
        evicting = used_blocks(llm)
        assert our_files(lambda: generate(llm, [tokens(random.Random(1), PROMPT)], 4)) != set()
        counts = compactor(llm).counts
    end = PROMPT + OUTPUT
    predicted = REQUESTS * sum(counts.start(n, PROMPT) // 32 for n in range(end - 32, end)) / 32
    measured = sum(a - b for a, b in zip(stock[-32:], evicting[-32:])) / 32
    assert len(stock) == len(evicting) > 100
    assert 0.9 * predicted <= measured <= predicted
    assert max(evicting) < max(stock)


@pytest.mark.engine
def test_what_lies_beside_the_cache_is_taken_off_its_memory(tiny_model: Path, tmp_path: Path) -> None:
    """Cache and retentions together fill the bytes that were given, to a block."""
    from transformers import AutoConfig

    from vllm_ext.training.gated import Gates

    config = AutoConfig.from_pretrained(tiny_model)
    Gates.of(config, inner=16, bias=5.0, seed=0).export(config, 64).save(tmp_path / "gates.safetensors")
    plugin = {"trim_kv": {"budget": 64, "stride": 64, "gates": str(tmp_path / "gates.safetensors")}}
    with start(tiny_model, plugin, num_gpu_blocks_override=None) as llm:
        given = llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes
        found = layers(llm).values()
        cache, side = (sum(x.nbytes for x in part) for part in zip(*((y.kv_cache, y.impl.side) for y in found)))
        block = (cache + side) // pool(llm).num_gpu_blocks
        assert side == cache // 64  # 4 bytes beside 2 * 32 channels of fp32
        assert given - block <= cache + side <= given


@pytest.mark.parametrize(
    ("name", "options", "left"),
    [
        ("snapkv", {}, 1000 << 20),
        ("rest_kv", {}, (1000 - 64) << 20),  # 32 layers x 32 heads x 128 x 128 x 4 bytes
        ("defensive_kv", {}, (1000 - 64) << 20),
        ("defensive_kv", {"norm": "l1"}, 1000 << 20),
        ("trim_kv", {}, (1000 << 20) * 128 // 129),  # 4 bytes beside 512
    ],
)
def test_memory_left_for_the_cache_of_llama_8b(name: str, options: dict[str, Any], left: int) -> None:
    from vllm_ext.config import expand
    from vllm_ext.kv_managers import memory

    model = SimpleNamespace(
        get_num_kv_heads=lambda p: 8, get_head_size=lambda: 128, get_num_layers=lambda p: 32, dtype=torch.bfloat16,
        get_num_attention_heads=lambda p: 32,
    )  # fmt: skip
    cfg: Any = SimpleNamespace(model_config=model, parallel_config=None)
    method = expand([name], {name: options}).plugins[name]
    assert memory.token_bytes(cfg) == 128 << 10
    assert memory.left_for_cache(method, cfg, 1000 << 20) == left
    assert bool(memory.text(method, cfg)) == (left < 1000 << 20)
    worker: Any = SimpleNamespace(determine_available_memory=lambda: 1000 << 20, vllm_config=cfg)
    memory.attach(method, worker)
    assert worker.determine_available_memory() == left
