"""A slot for each running request, found on the device: where a method keeps what a request carries from step to step.

A request is known by the page of its last computed token: no other running request writes there, for a prefix hit
covers at most the pages before a prompt's last one. `owner` names the slot of such a page, `tail` and `length` of the
slot confirm it, and every page loses its owner when a request enters it. So nothing has to be told when requests end,
are preempted or reuse pages. Torch operations only, without a host sync: they are the same on CPUs and in captured
graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ext.attention_backends.stages import DecodeBatch

LONGEST_STEP = 8
"""Most tokens that a request gains in a decode step."""


class RequestSlots:
    """`count` slots; slot `count` is written by requests without one and never read.

    Each prompt chunk takes the slots unused for longest; a request beyond `count` ends the state of the one that has
    waited longest, which from then on has none.
    """

    def __init__(self, count: int, page: int, device: torch.device | str) -> None:
        self.count, self.page = count, page
        ints = {"dtype": torch.int64, "device": device}
        self.tail, self.length, self.stamp = (torch.full((count + 1,), -1, **ints) for _ in range(3))
        self.stamp[count] = torch.iinfo(torch.int64).max
        self.clock = torch.zeros((), **ints)
        self.owner = torch.full((1,), -1, **ints)

    def fit(self, num_pages: int) -> None:
        """Room for the pages of the KV cache; a cache of another size starts afresh (profiling may use a small one)."""
        if self.owner.numel() != num_pages + 1:
            self.owner = torch.full((num_pages + 1,), -1, dtype=torch.int64, device=self.tail.device)

    def decode(self, batch: DecodeBatch) -> Tensor:
        """Slots of the decode rows of a step [R] int64, `count` where a request has none; once a step."""
        context, real = _rows(batch)
        at = (context - 1).clamp(min=0) // self.page
        new = (context + self.page - 1) // self.page
        entered = real & (new * self.page < batch.seq_lens)
        self._disown(batch.block_table, new, entered)
        now, before = (self._page(batch.block_table, x, real) for x in (at, (at - 1).clamp(min=0)))
        slots = self._find(now, context, LONGEST_STEP)
        slots = torch.where(slots < self.count, slots, self._find(before, context, LONGEST_STEP))
        self._move(slots, now, context)
        return slots

    def prompt(self, batch: DecodeBatch) -> tuple[Tensor, Tensor]:
        """(new slots, slots that hold the state of the prefix) of prompt chunks, [R] int64 each, `count` = none."""
        context, real = _rows(batch)
        source = self._find(self._page(batch.block_table, (context - 1).clamp(min=0) // self.page, real), context, 0)
        written = batch.slot_mapping // self.page
        self.owner.index_fill_(0, torch.where(batch.slot_mapping >= 0, written, self.owner.numel() - 1), -1)
        rows = real.numel()
        order = self.stamp[: self.count].argsort(stable=True)[:rows]
        slots = torch.full_like(context, self.count)
        slots[: order.numel()] = order
        slots = torch.where(real, slots, self.count)
        last = self._page(batch.block_table, (batch.seq_lens.long() - 1).clamp(min=0) // self.page, real)
        self._move(slots, last, batch.seq_lens.long())
        return slots, source

    def _page(self, table: Tensor, at: Tensor, real: Tensor) -> Tensor:
        """Physical pages at logical places `at` [R]; the last entry of `owner` where there is none."""
        found = table.gather(1, at[:, None].clamp(max=table.shape[1] - 1))[:, 0].long()
        return torch.where(real, found, self.owner.numel() - 1)

    def _disown(self, table: Tensor, at: Tensor, where: Tensor) -> None:
        self.owner.index_fill_(0, self._page(table, at, where), -1)

    def _find(self, page: Tensor, context: Tensor, slack: int) -> Tensor:
        """Slots that own `page` and were left with at most `slack` keys fewer than `context`."""
        slot = self.owner[page]
        slot = torch.where(slot >= 0, slot, self.count)
        behind = context - self.length[slot]
        ok = (slot < self.count) & (self.tail[slot] == page) & (behind >= 0) & (behind <= slack)
        return torch.where(ok, slot, self.count)

    def _move(self, slots: Tensor, page: Tensor, length: Tensor) -> None:
        """The requests of `slots` are now at `page` with `length` keys."""
        self.clock += 1
        held = slots < self.count
        self.tail[slots] = page
        self.length[slots] = length
        self.stamp[slots] = torch.where(held, self.clock, torch.iinfo(torch.int64).max)
        self.owner[torch.where(held, page, self.owner.numel() - 1)] = torch.where(held, slots, -1)


def _rows(batch: DecodeBatch) -> tuple[Tensor, Tensor]:
    """Keys before this step [R] int64, and which rows are requests: not padding, not a warm-up run."""
    starts = batch.query_start_loc.long()
    tokens = starts[1:] - starts[:-1]
    first = batch.slot_mapping[starts[:-1].clamp(max=max(batch.slot_mapping.numel() - 1, 0))]
    real = (batch.seq_lens > 0) & (tokens > 0) & (first >= 0)
    return torch.where(real, batch.seq_lens.long() - tokens, 0), real
