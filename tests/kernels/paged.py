"""Random paged caches for kernel tests: strided as vLLM's, pages in random order, garbage in free pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Paged:
    """A decode batch over a paged cache; shapes as in `vllm_ext.kernels.reference`."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    index: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    slot_mapping: Tensor
    lens: list[int]
    starts: list[int]
    scale: float

    @property
    def page(self) -> int:
        """Tokens a page."""
        return self.k_cache.shape[2]


def make(
    lens: list[int],
    queries: list[int],
    heads: int,
    g: int,
    d: int,
    page: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "HND",
    records: int = 2,
    seed: int = 0,
) -> Paged:
    """A batch of requests with `lens` cached keys, of which the last `queries` are this step's tokens."""
    gen = torch.Generator().manual_seed(seed)
    counts = [-(-n // page) for n in lens]
    total = sum(counts) + 3
    width, record = 2 * d, heads * records * d
    stride = heads * page * width + record
    raw = (torch.randn(total * stride, generator=gen) * 2).to(dtype).to(DEVICE)
    inner = (page * width, width) if layout == "HND" else (width, heads * width)
    cache = raw.as_strided((total, heads, page, width), (stride, *inner, 1))
    index = raw.as_strided((total, heads, records, d), (stride, records * d, d, 1), heads * page * width)
    index.fill_(float("nan"))
    order = (torch.randperm(total - 1, generator=gen) + 1).tolist()
    table = torch.zeros(len(lens), max([*counts, 1]) + 1, dtype=torch.int32)
    slots: list[int] = []
    for r, n in enumerate(lens):
        pages = [order.pop() for _ in range(counts[r])]
        table[r, : counts[r]] = torch.tensor(pages, dtype=torch.int32)
        slots += [pages[p // page] * page + p % page for p in range(n - queries[r], n)]
    starts = [0]
    for m in queries:
        starts.append(starts[-1] + m)
    q = torch.randn(starts[-1], heads * g, d, generator=gen).to(dtype).to(DEVICE)
    return Paged(
        q, cache[..., :d], cache[..., d:], index, table.to(DEVICE),
        torch.tensor(lens, dtype=torch.int32, device=DEVICE), torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        torch.tensor(slots, dtype=torch.int64, device=DEVICE), lens, starts, d**-0.5,
    )  # fmt: skip


def fill_index(p: Paged, kind: str) -> None:
    """Records of all complete pages, from scratch, by the reference."""
    from vllm_ext.kernels import reference

    for r, n in enumerate(p.lens):
        for page in p.block_table[r, : n // p.page].tolist():
            p.index[page] = reference.index_record(p.k_cache[page], kind)
