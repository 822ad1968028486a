"""The worker side without an engine: requests over a paged cache, by torch and by kernels, against dense attention."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from vllm_ext.kernels import kv_reference as reference
from vllm_ext.kv_managers.compactor import Compactor, Layer
from vllm_ext.kv_managers.counts import Counts
from vllm_ext.kv_managers.r_kv import RKV
from vllm_ext.kv_managers.random_kv import RandomKV
from vllm_ext.kv_managers.rows import Row
from vllm_ext.kv_managers.snapkv import SnapKV
from vllm_ext.kv_managers.streaming_llm import StreamingLLM

LAYERS, HEADS, GROUP, DIM, BLOCK, BLOCKS = 2, 2, 2, 16, 32, 80
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = {
    "snapkv": SnapKV(budget=64, window=16),
    "snapkv layer": SnapKV(ratio=0.4, window=16, scope="layer"),
    "snapkv model": SnapKV(budget=64, window=16, scope="model"),
    "r_kv": RKV(budget=64, stride=32),
    "streaming_llm": StreamingLLM(budget=64, stride=32, window=8),
    "random_kv": RandomKV(budget=64),
}


class Worker:
    """A worker in small: writes keys, values and queries of random tokens, and evicts as the backends do."""

    def __init__(self, method: Any, fused: Any = None, ring_slots: int = 4, seed: int = 0) -> None:
        object.__setattr__(method, "needs_positions", True)
        gen = torch.Generator().manual_seed(seed)
        shape = (BLOCKS, HEADS, BLOCK, 2 * DIM)
        caches = [torch.randn(shape, generator=gen).to(DEVICE) for _ in range(LAYERS)]
        rings = [torch.full((ring_slots, method.window, HEADS * GROUP, DIM), torch.nan, device=DEVICE) for _ in caches]
        self.method = method
        self.compactor = Compactor(Counts(method), ring_slots=ring_slots, scale=DIM**-0.5, fused=fused)
        self.compactor.layers = [
            Layer(i, c, c[..., :DIM], c[..., DIM:], rings[i], None, None) for i, c in enumerate(caches)
        ]
        if fused is not None:
            fused.bind(self.compactor.layers)
        self.order = list(range(1, BLOCKS))
        self.worst = 0.0

    def admit(self, name: str, prompt: int, longest: int, seed: int) -> dict[str, Any]:
        """A request with its tokens' queries, keys and values, [n, layers, heads, D]."""
        gen = torch.Generator().manual_seed(seed)
        make = lambda heads: torch.randn(longest, LAYERS, heads, DIM, generator=gen).to(DEVICE)  # noqa: E731
        blocks = [self.order.pop() for _ in range(-(-longest // BLOCK))]
        return {
            "name": name, "prompt": prompt, "q": make(HEADS * GROUP), "k": make(HEADS), "v": make(HEADS),
            "row": torch.tensor(blocks, dtype=torch.int32, device=DEVICE),
        }  # fmt: skip

    def step(self, request: dict[str, Any], before: int, after: int) -> int:
        """Compute tokens [before, after): evict, write, attend, compare, record."""
        row = Row(request["name"], before, after, request["prompt"])
        start = self.compactor.begin(row, lambda: request["row"])
        assert start == self.compactor.counts.start(before, request["prompt"])
        ring, first, end = self.compactor.record_range(row) if self.method.needs_queries else (-1, 0, 0)
        slots = torch.arange(before, after, device=DEVICE)
        for i, layer in enumerate(self.compactor.layers):
            page = request["row"][slots // BLOCK].long()
            layer.keys[page, :, slots % BLOCK] = request["k"][before:after, i]
            layer.values[page, :, slots % BLOCK] = request["v"][before:after, i]
            self.worst = max(self.worst, self.compare(request, i, layer, start, before, after))
            if end > first:
                at = torch.arange(first, end, device=DEVICE)
                layer.ring[ring, at % self.method.window] = request["q"][first:end, i]
        return start

    def compare(self, request: dict[str, Any], i: int, layer: Layer, start: int, before: int, after: int) -> float:
        """Attention over the resident slots against dense attention masked to the kept positions."""
        k, v = (reference.resident(c, request["row"], start, after) for c in (layer.keys, layer.values))
        kept = torch.ones(HEADS, after, dtype=torch.bool, device=DEVICE)
        if start:
            positions = self.compactor.requests[request["name"]].positions[i]
            kept[:] = False
            kept.scatter_(1, positions, True)
            kept[:, start + positions.shape[1] :] = True
            assert (positions.diff(dim=-1) > 0).all()
        newest = slice(before, after)
        got = attend(request["q"][newest, i], k, v, torch.arange(start, after, device=DEVICE), before)
        dense = [request[x][:after, i].transpose(0, 1) for x in "kv"]
        want = attend(request["q"][newest, i], *dense, torch.arange(after, device=DEVICE), before, kept)
        return (got - want).abs().max().item()


def attend(q: Any, k: Any, v: Any, slots: Any, before: int, kept: Any = None) -> torch.Tensor:
    """Causal attention of tokens [before, ...) over slots; a compacted slot is older than every query."""
    q = q.unflatten(1, (HEADS, GROUP)).double()
    logits = torch.einsum("thgd,hnd->hgtn", q, k.double()) * DIM**-0.5
    hidden = slots[None] > before + torch.arange(len(q), device=q.device)[:, None]
    logits = logits.masked_fill(hidden, -torch.inf)
    if kept is not None:
        logits = logits.masked_fill(~kept[:, None, None], -torch.inf)
    return torch.einsum("hgtn,hnd->thgd", logits.softmax(-1), v.double())


def serve(worker: Worker, prompts: list[int], output: int, chunk: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Interleave several requests; returns what the compressed ones kept."""
    rnd = random.Random(seed)
    live = [worker.admit(f"r{i}", n, n + output, i) | {"at": 0} for i, n in enumerate(prompts)]
    while live:
        for request in list(live):
            left = max(1, request["prompt"] - request["at"])
            after = request["at"] + min(left, chunk, rnd.choice((1, chunk, chunk)))
            worker.step(request, request["at"], after)
            request["at"] = after
            if after == request["prompt"] + output:
                live.remove(request)
    return {n: r.positions for n, r in worker.compactor.requests.items() if r.positions is not None}


CASES = [(name, False) for name in METHODS] + [(name, True) for name in ("snapkv", "snapkv model", "r_kv")]


@pytest.mark.parametrize(("name", "kernels"), CASES, ids=str)
def test_attention_reads_exactly_what_was_kept(name: str, kernels: bool) -> None:
    from vllm_ext.kv_managers.device_ops import DeviceOps

    worker = Worker(METHODS[name], DeviceOps() if kernels else None)
    lengths = [97, 150] if kernels and DEVICE == "cpu" else [40, 97, 128, 200, 300]
    kept = serve(worker, lengths, 70 if kernels else 100, 64)
    assert worker.worst < 1e-6
    assert len(kept) >= 2
    assert worker.compactor.totals.tokens_dropped > 0
    worker.compactor.forget(set())
    assert len(worker.compactor.free_rings) == 4


def test_chunks_do_not_change_what_a_prompt_keeps() -> None:
    found = [serve(Worker(METHODS["snapkv"]), [300, 200], 10, chunk) for chunk in (7, 64, 512)]
    for other in found[1:]:
        assert all(torch.equal(found[0][n], other[n]) for n in found[0])


def test_sinks_and_newest_tokens_stay() -> None:
    worker = Worker(METHODS["streaming_llm"])
    positions = serve(worker, [300], 40, 64)["r0"]
    assert positions[0, 0, :4].tolist() == [0, 1, 2, 3]
    assert positions[0, 0, 4:].tolist() == list(range(positions.max().item() - 59, positions.max().item() + 1))
    kept = serve(Worker(METHODS["snapkv"]), [300], 10, 64)["r0"]
    assert (kept[..., :4] == torch.arange(4, device=DEVICE)).all()
    assert (kept[..., -4:] == torch.arange(284, 288, device=DEVICE)).all()  # of the window 284..299, up to the boundary


def test_layer_scope_keeps_one_set_a_layer() -> None:
    kept = serve(Worker(METHODS["snapkv layer"]), [300], 10, 64)["r0"]
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert not torch.equal(kept[0], kept[1])
    kept = serve(Worker(METHODS["snapkv model"]), [300], 10, 64)["r0"]
    assert torch.equal(kept[0], kept[1])


def test_a_restarted_request_is_compressed_again() -> None:
    """After a preemption its tokens are computed anew, into other blocks: the same tokens stay."""
    worker = Worker(METHODS["snapkv"])
    request = worker.admit("r", 200, 260, 5)
    worker.step(request, 0, 200)
    worker.step(request, 200, 201)
    first = worker.compactor.requests["r"].positions
    request["row"] = torch.tensor([worker.order.pop() for _ in range(9)], dtype=torch.int32, device=DEVICE)
    worker.step(request, 0, 128)
    assert worker.compactor.requests["r"].start == 0
    worker.step(request, 128, 201)
    worker.step(request, 201, 202)
    assert worker.compactor.requests["r"].start > 0
    assert worker.worst < 1e-6
    assert first.shape == worker.compactor.requests["r"].positions.shape


def test_a_score_that_is_not_finite_stops_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        pytest.skip("a device-side assertion would end the process")
    monkeypatch.setattr(RandomKV, "score", lambda self, view: torch.full((LAYERS, HEADS, view.n), torch.nan))
    worker = Worker(METHODS["random_kv"])
    request = worker.admit("r", 200, 260, 5)
    worker.step(request, 0, 200)
    with pytest.raises(RuntimeError, match="random_kv: a score is not finite"):
        worker.step(request, 200, 201)


@pytest.mark.parametrize("name", METHODS)
def test_warm_up_leaves_nothing_behind(name: str) -> None:
    from types import SimpleNamespace

    from vllm_ext.kv_managers import warm_up

    worker = Worker(METHODS[name])
    steps: Any = SimpleNamespace(
        counts=worker.compactor.counts, compactor=worker.compactor, layers=lambda runner: worker.compactor.layers
    )
    before = [layer.cache.clone() for layer in worker.compactor.layers]
    assert len(warm_up.prompts(steps, 6000)) >= 1
    warm_up.run(steps, None, 6000)
    assert all(torch.equal(layer.cache, old) for layer, old in zip(worker.compactor.layers, before))
    assert worker.compactor.totals.compactions == 0
    assert worker.compactor.requests == {}
    assert len(worker.compactor.free_rings) == 4
    assert warm_up.prompts(steps, 40) == []


@pytest.mark.parametrize("name", ["r_kv", "snapkv layer"])
def test_requests_that_evict_together_keep_what_each_keeps_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ext.kv_managers import compactor
    from vllm_ext.kv_managers.device_ops import DeviceOps

    prompts, batches = [96, 96, 128, 96], []
    together, alone = Worker(METHODS[name], DeviceOps()), Worker(METHODS[name])
    evict = together.compactor._evict
    monkeypatch.setattr(together.compactor, "_evict", lambda batch: batches.append(len(batch)) or evict(batch))
    for worker in (together, alone):
        requests = [worker.admit(str(i), n, n + 1, i) for i, n in enumerate(prompts)]
        rows = [Row(x["name"], 0, x["prompt"], x["prompt"]) for x in requests]
        for request in requests:
            worker.step(request, 0, request["prompt"])
        if worker is together:
            monkeypatch.setattr(compactor, "WORKSPACE_BYTES", 2 * together.compactor._layer_bytes(96) * LAYERS)
            rows = [None, *(row._replace(before=row.after, after=row.after + 1) for row in rows)]
            tables = [None, *(request["row"] for request in requests)]
            starts = worker.compactor.begin_step(rows, tables.__getitem__)
        else:
            for request in requests:
                worker.step(request, request["prompt"], request["prompt"] + 1)
    assert batches == [2, 1, 1]
    for name, request in alone.compactor.requests.items():
        other = together.compactor.requests[name]
        assert torch.equal(other.positions, request.positions)
        assert (other.start, other.due, other.ring < 0) == (request.start, request.due, request.ring < 0)
        assert starts[1 + int(name)] == request.start > 0
    totals = [w.compactor.totals.__dict__ | {"seconds": 0} for w in (together, alone)]
    assert totals[0] == totals[1]
