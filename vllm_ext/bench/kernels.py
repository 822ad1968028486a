"""Each kernel against its byte floor, beside the dense paged decode of FlashAttention 3 and FlashInfer. CUDA only.

The batch is that of Llama-3.1-8B: 8 KV heads, groups of 4, head size 128, pages of 64, bf16, with the min/max index
behind each page. Keys are noise, except for a few pages of each request and head that point along its queries: the
peaked attention of long contexts. Times are medians of CUDA graph replays that walk over several caches, together
larger than the L2 cache; the floor is the bytes that must be read over the measured copy bandwidth. Every case runs in
a process of its own: an illegal memory access ends a CUDA context, and with it the case.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_ext.bench import method_ops
from vllm_ext.bench.decode import Case
from vllm_ext.bench.shapes import copy_bandwidth
from vllm_ext.options import ConfigError, did_you_mean

HEADS, GROUP, SIZE, PAGE = 8, 4, 128, 64
SCALE = SIZE**-0.5
FILL = 4096
"""Pages written at once: torch's indexed writes fault on views of more than 2^31 elements."""
PEAKS = 4
"""Pages of a request and KV head whose keys point along the queries."""


@dataclass
class Layer:
    """One layer's inputs; shapes as in `vllm_ext.kernels.reference`."""

    q: Any
    k: Any
    v: Any
    index: Any
    table: Any
    out: Any


@dataclass
class Batch:
    """What the kernels share: lengths, offsets, scratch, and several layers to walk over."""

    case: Case
    capacity: int
    layers: list[Layer]
    seq_lens: Any
    start: Any
    slots: Any
    zeros: Any
    select: Any
    decode: Any

    @property
    def length(self) -> int:
        """Keys of a request; one less than the context, so that no page is completed in the timed step."""
        return self.case.context - 1

    @property
    def pages(self) -> int:
        """Pages of a request."""
        return -(-self.length // PAGE)


def make_batch(case: Case, budget: int, seed: int = 0, device: str = "cuda") -> Batch:
    """Random inputs, reproducible by seed; as many layers as fit into 24 GB, at most 8."""
    import torch

    from vllm_ext.kernels.score_select import SelectBuffers
    from vllm_ext.kernels.sparse_decode import DecodeBuffers

    torch.manual_seed(seed)
    capacity, pages = budget // PAGE, -(-case.context // PAGE)
    cache_bytes = case.batch * pages * PAGE * HEADS * SIZE * 4
    count = int(max(2, min(8, 24e9 // cache_bytes)))
    layers = [_layer(case, pages, device) for _ in range(count)]
    ints = {"dtype": torch.int32, "device": device}
    last = case.context - 2
    slots = torch.stack([t[last // PAGE].long() * PAGE + last % PAGE for t in layers[0].table])
    return Batch(
        case=case,
        capacity=capacity,
        layers=layers,
        seq_lens=torch.full((case.batch,), case.context - 1, **ints),
        start=torch.arange(case.batch + 1, **ints),
        slots=slots,
        zeros=torch.zeros(case.batch, **ints),
        select=SelectBuffers.allocate(case.batch, HEADS, GROUP, pages, capacity, "max", device),
        decode=DecodeBuffers.allocate(case.batch, HEADS, GROUP, SIZE, device),
    )


def _layer(case: Case, pages: int, device: str) -> Layer:
    """Pages laid out as vLLM does, [H, P, K|V] and the index record behind, in random physical order."""
    import torch

    from vllm_ext.kernels.reference import index_record

    total, content, record = case.batch * pages, HEADS * PAGE * 2 * SIZE, HEADS * 2 * SIZE
    raw = torch.empty(total, content + record, dtype=torch.bfloat16, device=device)
    for rows in raw.split(FILL):
        rows.normal_()
    cache = raw[:, :content].view(total, HEADS, PAGE, 2 * SIZE)
    k, v = cache[..., :SIZE], cache[..., SIZE:]
    index = raw[:, content:].view(total, HEADS, 2, SIZE)
    table = torch.randperm(total, device=device).view(case.batch, pages).int()
    q = torch.randn(case.batch, HEADS * GROUP, SIZE, device=device).to(torch.bfloat16)
    direction = torch.nn.functional.normalize(q.float().view(case.batch, HEADS, GROUP, SIZE).mean(2), dim=-1)
    for head in range(HEADS):
        peaks = torch.rand(case.batch, pages, device=device).topk(min(PEAKS, pages)).indices
        where = table.gather(1, peaks).long().flatten()
        added = (16 * direction[:, head]).to(k.dtype).repeat_interleave(peaks.shape[1], 0)[:, None]
        for at in range(0, total, FILL):
            here = (where >= at) & (where < at + FILL)
            k[at : at + FILL, head].index_add_(0, where[here] - at, added[here].expand(-1, PAGE, -1))
    for at in range(0, total, FILL):
        index[at : at + FILL] = index_record(k[at : at + FILL], "minmax")
    return Layer(q, k, v, index, table, torch.empty_like(q))


# Every entry: name -> (bytes that one call must move, a call on one layer). Lists are filled before any timing.
def _score_select(b: Batch) -> tuple[float, Callable[[Layer], Any]]:
    """K2 + K3: floor = the min/max index of every page."""
    from vllm_ext.kernels.score_select import score_select

    def call(x: Layer) -> Any:
        return score_select(
            x.q, x.k, x.index, x.table, b.seq_lens, b.start, b.zeros, b.slots, b.select, max_query_len=1, scale=SCALE,
            dense_limit=0, capacity=b.capacity, sink=1, local=2, score="bound", group="max", index_kind="minmax",
        )  # fmt: skip

    return b.case.batch * b.pages * HEADS * 2 * SIZE * 2, call


def _scores_alone(b: Batch) -> tuple[float, Callable[[Layer], Any]]:
    """K2: the same launch with tickets that never say "last", so that no program selects; floor as `_score_select`."""
    import torch

    silent = torch.full_like(b.select.ticket, -(2**30))
    return _score_select(replace(b, select=replace(b.select, ticket=silent)))


def _sparse_decode(b: Batch) -> tuple[float, Callable[[Layer], Any]]:
    """K4 + K5: floor = keys and values of the listed pages."""
    from vllm_ext.kernels.sparse_decode import sparse_decode

    pages, counts = b.select.pages[: b.case.batch], b.select.counts[: b.case.batch]

    def call(x: Layer) -> Any:
        return sparse_decode(
            x.q, x.k, x.v, x.table, b.seq_lens, b.start, pages, counts, x.out, b.decode, max_query_len=1, scale=SCALE
        )

    return b.case.batch * HEADS * min(b.capacity, b.pages) * PAGE * 2 * SIZE * 2, call


def _attention_op(b: Batch) -> tuple[float, Callable[[Layer], Any]]:
    """The whole step of a sparse layer: score, select, attend, merge."""
    (first, select), (second, attend) = _score_select(b), _sparse_decode(b)

    def call(x: Layer) -> None:
        select(x)
        attend(x)

    return first + second, call


def _update_index(b: Batch) -> tuple[float, Callable[[Layer], Any]]:
    """K1 on a prefill chunk of up to 8192 tokens: floor = its keys read, its records written."""
    import torch

    from vllm_ext.kernels.index_update import update_index

    tokens = min(8192, b.case.context // PAGE * PAGE)
    offsets = torch.arange(tokens, device="cuda")
    slots = {id(x): x.table[0][offsets // PAGE].long() * PAGE + offsets % PAGE for x in b.layers}
    size = tokens * HEADS * SIZE * 2 + tokens // PAGE * HEADS * 2 * SIZE * 2
    return size, lambda x: update_index(x.k, x.index, slots[id(x)], "minmax")


def _fa3(b: Batch) -> tuple[float, Callable[[Layer], Any]]:
    """Dense FlashAttention 3 on the same padded pages: floor = every key and value."""
    import torch
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    n = b.length
    plan = get_scheduler_metadata(
        b.case.batch, 1, n, HEADS * GROUP, HEADS, SIZE, b.seq_lens, qkv_dtype=torch.bfloat16, cu_seqlens_q=b.start,
        page_size=PAGE, causal=True, num_splits=0,
    )  # fmt: skip

    def call(x: Layer) -> Any:
        # FlashAttention takes [pages, P, H, D]; vLLM hands it the same transposed view.
        return flash_attn_varlen_func(
            x.q, x.k.transpose(1, 2), x.v.transpose(1, 2), 1, b.start, n, seqused_k=b.seq_lens, causal=True,
            block_table=x.table, out=x.out, scheduler_metadata=plan, fa_version=3, softmax_scale=SCALE,
        )  # fmt: skip

    return b.case.batch * n * HEADS * 2 * SIZE * 2, call


def _flashinfer(b: Batch) -> tuple[float, Callable[[Layer], Any]]:
    """Dense FlashInfer paged decode with tensor cores on contiguous pages of its own layout (random keys)."""
    import torch
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    space = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(space, "HND", use_tensor_cores=True)
    total = b.case.batch * b.pages
    ends = torch.arange(b.case.batch + 1, dtype=torch.int32, device="cuda") * b.pages
    pages = b.layers[0].table[:, : b.pages].reshape(-1).contiguous()
    last = torch.full((b.case.batch,), (b.length - 1) % PAGE + 1, dtype=torch.int32, device="cuda")
    bf16 = torch.bfloat16
    wrapper.plan(
        ends, pages, last, HEADS * GROUP, HEADS, SIZE, PAGE, q_data_type=bf16, kv_data_type=bf16, sm_scale=SCALE
    )
    shape = (int(b.layers[0].k.shape[0]), 2, HEADS, PAGE, SIZE)
    caches = {id(x): torch.empty(shape, dtype=bf16, device="cuda").normal_() for x in b.layers[:2]}
    assert total <= shape[0]

    def call(x: Layer) -> Any:
        return wrapper.run(x.q, caches.get(id(x), caches[id(b.layers[0])]), out=x.out)

    return b.case.batch * b.length * HEADS * 2 * SIZE * 2, call


KERNELS: dict[str, Callable[[Batch], tuple[float, Callable[[Layer], Any]]]] = {
    "fa3 (dense)": _fa3,
    "score_select": _score_select,
    "score_select, scores alone": _scores_alone,
    "sparse_decode": _sparse_decode,
    "attention op": _attention_op,
    **{f"attention op, {name}": method_ops.entry(name, options) for name, options in method_ops.METHODS.items()},
    "update_index, prefill": _update_index,
    "flashinfer (dense)": _flashinfer,
}
"""What is timed, in this order; a new kernel is one entry."""


def measure(call: Callable[[Layer], Any], layers: list[Layer]) -> float:
    """Seconds of one call: median of graph replays that call every layer in turn."""
    import torch
    from triton.testing import do_bench_cudagraph

    def walk() -> None:
        for layer in layers:
            call(layer)

    walk()
    # do_bench_cudagraph calls on a stream of its own, which waits for nothing: neither for inputs that are still being
    # written (FlashAttention's schedule, page tables) nor for calls that use the same scratch.
    torch.cuda.synchronize()
    return do_bench_cudagraph(walk, rep=100, return_mode="median") / 1e3 / len(layers)


def error(b: Batch, name: str) -> float | None:
    """Relative error of the last layer's first request against fp32 over the same keys; None if there is no output."""
    from vllm_ext.kernels.reference import sparse_attention

    if name not in ("sparse_decode", "attention op", "fa3 (dense)"):
        return None
    x = b.layers[-1]
    if name != "fa3 (dense)":
        _score_select(b)[1](x)  # the lists of this layer, not of the one timed last
    x.out.fill_(float("nan"))
    KERNELS[name](b)[1](x)
    count = int(b.select.counts[0, 0])
    ids = None if name == "fa3 (dense)" else b.select.ids[0][:, :count]
    want, _ = sparse_attention(x.q[:1], x.k, x.v, x.table[0][: b.pages], ids, b.length, SCALE)
    got = x.out[:1].float()
    return float((got - want).norm() / want.norm())


def run(
    cases: list[Case],
    only: list[str] | None,
    budget: int,
    on_case: Callable[[list[dict[str, Any]]], None] = lambda results: None,
) -> list[dict[str, Any]]:
    """Time the kernels on every case; JSON-ready rows, also given to `on_case` after each case.

    A row without a time says why (`skipped`); if it ended its case, it is also marked `failed`.

    Raises:
        ConfigError: no CUDA, an unknown kernel, or a budget that is no whole number of pages.
    """
    import torch

    from vllm_ext.evaluation.worker import fresh_process

    for name in only or []:
        if name not in KERNELS:
            raise ConfigError(f"--only '{name}' is no kernel{did_you_mean(name, list(KERNELS))}")
    if budget < 4 * PAGE or budget % PAGE:
        raise ConfigError(f"--budget must be a multiple of {PAGE} and at least {4 * PAGE}, got {budget}.")
    if not torch.cuda.is_available():
        raise ConfigError("bench kernels needs a CUDA device; run it there, or use bench decode on this machine.")
    results: list[dict[str, Any]] = []
    for case in cases:
        job = {"label": case.label, "case": asdict(case), "only": only, "budget": budget}
        try:
            results += fresh_process("vllm_ext.bench.kernels:run_job", job)["rows"]
        except ConfigError as problem:
            row = {"case": case.label, "kernel": "every kernel", "budget": budget}
            results.append(row | {"skipped": str(problem), "failed": True})
        on_case(results)
    return results


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Time one case in this process: `rows`, up to one that ended the case."""
    only = job["only"]
    bandwidth = copy_bandwidth()
    batch = make_batch(Case(**job["case"]), job["budget"])
    _score_select(batch)[1](batch.layers[0])
    rows: list[dict[str, Any]] = []
    for name in KERNELS:
        if not only or name in only:
            rows.append(_row(batch, name, bandwidth))
            if "failed" in rows[-1]:
                break
    dense = min((r["time_s"] for r in rows if "(dense)" in r["kernel"] and "time_s" in r), default=None)
    for row in rows:
        if dense and "time_s" in row and row["kernel"] != "update_index, prefill":
            row["vs_dense"] = dense / row["time_s"]
    return {"rows": rows}


def _row(batch: Batch, name: str, bandwidth: float) -> dict[str, Any]:
    """Time one kernel. A baseline that is not installed or does not run is skipped; any other failure ends the case."""
    row: dict[str, Any] = {"case": batch.case.label, "kernel": name, "budget": batch.capacity * PAGE}
    try:
        size, call = KERNELS[name](batch)
        seconds = measure(call, batch.layers)
        return row | {
            "time_s": seconds,
            "bytes": size,
            "floor_s": size / bandwidth,
            "error": error(batch, name),
            "bandwidth": bandwidth,
        }
    except Exception as problem:
        reason = f"{type(problem).__name__}: {str(problem)[:200]}"
        if "(dense)" in name and context_lives():
            return row | {"skipped": reason}
        traceback.print_exc()
        return row | {"skipped": f"ended the case: {reason}", "failed": True}


def context_lives() -> bool:
    """Whether CUDA still works in this process; after an illegal memory access every later call fails."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True
