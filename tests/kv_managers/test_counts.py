"""Counts of resident tokens, and the scheduler's pool under 2,000 random requests: no model needed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from vllm_ext.kv_managers.counts import Counts
from vllm_ext.kv_managers.r_kv import RKV
from vllm_ext.kv_managers.snapkv import SnapKV
from vllm_ext.kv_managers.streaming_llm import StreamingLLM

METHODS = {
    "ratio": SnapKV(ratio=0.3, window=16),
    "budget": SnapKV(budget=64, window=16),
    "decode": RKV(budget=64, stride=32),
    "streaming": StreamingLLM(budget=64, stride=32),
}
BLOCK = 32


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("prompt", [1, 63, 64, 65, 95, 96, 97, 200, 1000])
def test_resident_slots(method: Any, prompt: int) -> None:
    """`start` is a block boundary, never falls, keeps `kept` tokens and the tail, and agrees with the other counts."""
    counts = Counts(method)
    first, kept = counts.first_event(prompt), counts.kept(prompt)
    starts = [counts.start(n, prompt) for n in range(prompt + 400)]
    assert all(s % BLOCK == 0 for s in starts)
    assert starts == sorted(starts)
    for n, start in enumerate(starts):
        assert (start > 0) == (first is not None and n >= first)
        if start:
            assert kept <= n - start < kept + (method.stride if method.trigger != "prefill_end" else 10**9)
        if method.trigger != "streaming" and n < prompt:
            assert start == 0
    if first is None:
        assert counts.publishable(prompt) is counts.longest_hit(prompt) is None
        return
    assert counts.publishable(prompt) == counts.start(first, prompt) > 0
    assert counts.longest_hit(prompt) <= counts.publishable(prompt)
    assert counts.longest_hit(prompt) + method.window <= first


def test_ratio_one_never_evicts() -> None:
    counts = Counts(SnapKV(ratio=1.0))
    assert all(counts.first_event(n) is None for n in range(1, 3000, 7))


@pytest.fixture
def pool_manager(request: pytest.FixtureRequest) -> Any:
    """A KVCacheManager of 100 blocks over one group of a method's spec."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    from vllm_ext.kv_managers.spec import EvictionSpec

    counts = Counts(METHODS[request.param])
    stock = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    spec = EvictionSpec.of(stock, counts=counts, groups=(counts,), in_flight=512, longest=2000)
    config = KVCacheConfig(num_blocks=100, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return KVCacheManager(config, max_model_len=2000, scheduler_block_size=BLOCK, hash_block_size=BLOCK)


def new_request(rnd: random.Random, number: int, prompts: list[list[int]]) -> Any:
    """A random request; a third repeat or extend an earlier prompt."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    tokens = [rnd.randrange(1000) for _ in range(rnd.randint(1, 900))]
    if prompts and rnd.random() < 0.4:
        tokens = rnd.choice(prompts) + tokens[: rnd.choice((0, 5, 300))]
    prompts.append(tokens[:1200])
    params = SamplingParams(max_tokens=rnd.randint(1, 200))
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(f"r{number}", tokens[:1200], params, None, block_hasher=hasher)


class Simulation:
    """A scheduler in small: chunks, one step in flight, aborts, preemptions."""

    def __init__(self, manager: Any, seed: int) -> None:
        self.manager, self.rnd = manager, random.Random(seed)
        self.inner = manager.coordinator.single_type_managers[0]
        self.running: list[Any] = []
        self.waiting: list[Any] = []
        self.prompts: list[list[int]] = []
        self.hits = self.preemptions = self.aborts = 0
        self.begun: dict[str, int] = {}

    def step(self, request: Any) -> bool:
        """Schedule a chunk; False if the pool is full."""
        fresh = request.num_computed_tokens == 0 and request.request_id not in self.inner.num_cached_block
        blocks, hit = None, 0
        if fresh:
            blocks, hit, _ = self.manager.get_computed_blocks(request)
            limit = self.inner.counts.longest_hit(request.num_prompt_tokens)
            assert limit is None or hit <= limit
        left = max(1, request.num_tokens - request.num_computed_tokens - hit)
        chunk = min(left, self.rnd.choice((16, 128, 512)))
        if self.manager.allocate_slots(request, chunk, hit, blocks, full_sequence_must_fit=fresh) is None:
            return False
        self.hits += hit
        request.num_computed_tokens += hit + chunk
        request.num_in_flight_tokens = chunk
        if request.num_computed_tokens >= request.num_tokens:
            request.append_output_token_ids(self.rnd.randrange(1000))
        return True

    def check(self, request: Any) -> None:
        """Every resident slot of the last two steps has a block of its own; what eviction writes is private."""
        counts, prompt = self.inner.counts, request.num_prompt_tokens
        held = self.inner.req_to_blocks[request.request_id]
        n = request.num_computed_tokens
        start = counts.start(n, prompt)
        live = held[start // BLOCK : -(-n // BLOCK)]
        assert all(not b.is_null for b in live)
        if start:
            assert all(b.block_hash is None and b.ref_cnt == 1 for b in live)

    def end(self, request: Any) -> None:
        self.manager.free(request)
        self.running.remove(request)

    def preempt(self) -> Any:
        """Take the blocks of the newest running request; it waits for its turn again."""
        victim = self.running.pop()
        self.preemptions += 1
        self.manager.free(victim)
        victim.num_computed_tokens = victim.num_in_flight_tokens = 0
        self.waiting.insert(0, victim)
        return victim

    def turn(self) -> None:
        """One scheduler step."""
        for request in list(self.running):
            if request not in self.running:
                continue
            while not self.step(request):
                if self.preempt() is request:
                    break
            else:
                self.check(request)
                if request.num_output_tokens >= request.sampling_params.max_tokens or request.num_tokens >= 1900:
                    self.end(request)
                elif self.rnd.random() < 0.001:
                    self.aborts += 1
                    self.end(request)
        while self.waiting and len(self.running) < 8 and self.step(self.waiting[0]):
            self.running.append(self.waiting.pop(0))


@pytest.mark.parametrize("pool_manager", METHODS, indirect=True)
def test_pool_is_exact_after_random_requests(pool_manager: Any) -> None:
    """500 requests a method, 2,000 in all, with hits, aborts and preemptions: every block comes back."""
    run = Simulation(pool_manager, seed=1)
    run.waiting = [new_request(run.rnd, i, run.prompts) for i in range(500)]
    pool = pool_manager.block_pool
    for _ in range(100_000):
        run.turn()
        used = {b.block_id for blocks in run.inner.req_to_blocks.values() for b in blocks if not b.is_null}
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 - len(used)
        if not (run.waiting or run.running):
            break
    assert not run.waiting
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert min(run.hits, run.aborts, run.inner.blocks_freed) > 0
    assert run.preemptions or run.inner.counts.method.trigger == "streaming"  # eight of those always fit
    assert not run.inner._processed
    assert not run.inner._requests


def test_the_spec_survives_a_pickle_and_a_merge() -> None:
    """Workers send it to the scheduler's process; layers of one budget merge, others do not."""
    import pickle

    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_ext.kv_managers.spec import EvictionManager, EvictionSpec

    stock = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    both = Counts(METHODS["budget"]), Counts(METHODS["budget"], 0.5)
    one, other = (EvictionSpec.of(stock, counts=c, groups=both, in_flight=512, longest=2000) for c in both)
    assert pickle.loads(pickle.dumps(one)) == one
    assert hash(pickle.loads(pickle.dumps(one))) == hash(one)
    assert EvictionSpec.merge([one, one]) == one
    assert one.is_uniform_with_collection({"a": one})
    assert not one.is_uniform_with_collection({"a": one, "b": other})
    assert KVCacheSpecRegistry.get_manager_class(one) is EvictionManager
    assert KVCacheSpecRegistry.get_manager_class(stock) is not EvictionManager
