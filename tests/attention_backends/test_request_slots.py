"""Slots of requests under a simulated scheduler: chunks, prefix hits, page reuse, drafts, preemption."""

from __future__ import annotations

import random

import pytest
import torch

from vllm_ext.attention_backends.request_slots import RequestSlots
from vllm_ext.attention_backends.stages import DecodeBatch

PAGE, POOL = 16, 60


class Request:
    """Pages, computed keys, and the slot that the last step gave."""

    def __init__(self, prompt: int, pages: list[int], computed: int) -> None:
        self.prompt, self.pages, self.computed = prompt, pages, computed
        self.slot: int | None = None


def batch(rows: list[tuple[Request, int]]) -> DecodeBatch:
    """The step in which each request computes m tokens."""
    table = torch.zeros(len(rows), 64, dtype=torch.int32)
    starts, slots, lens = [0], [], []
    for r, (request, m) in enumerate(rows):
        table[r, : len(request.pages)] = torch.tensor(request.pages, dtype=torch.int32)
        lens.append(request.computed + m)
        starts.append(starts[-1] + m)
        slots += [request.pages[i // PAGE] * PAGE + i % PAGE for i in range(request.computed, lens[-1])]
    ints = {"dtype": torch.int32}
    flags = torch.zeros(len(rows), **ints)
    lengths, begins = torch.tensor(lens, **ints), torch.tensor(starts, **ints)
    return DecodeBatch(table, lengths, begins, torch.tensor(slots), flags, starts[-1], 8)


class Scheduler:
    """Requests that come, share prefixes, decode with drafts, are preempted and end, in random order."""

    def __init__(self, seed: int, slots: int) -> None:
        self.rnd = random.Random(seed)
        self.slots = RequestSlots(slots, PAGE, "cpu")
        self.slots.fit(POOL)
        self.free = list(range(1, POOL))
        self.users: dict[int, int] = {}
        self.running: list[Request] = []
        self.lost = self.steps = 0

    def take(self, request: Request, upto: int) -> bool:
        """Pages for `upto` keys, in an order that reuses the freed ones soon."""
        while len(request.pages) * PAGE < upto:
            if not self.free:
                return False
            page = self.free.pop()
            self.users[page] = 1
            request.pages.append(page)
        return True

    def end(self, request: Request) -> None:
        self.running.remove(request)
        for page in request.pages:
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)

    def arrive(self) -> None:
        """A prompt, perhaps a copy of another request's beginning with its full pages."""
        prompt, hit = self.rnd.randint(1, 150), 0
        pages: list[int] = []
        if self.running and self.rnd.random() < 0.5:
            other = self.rnd.choice(self.running)
            hit = self.rnd.randint(0, other.computed // PAGE)
            prompt = hit * PAGE + self.rnd.randint(1, 40)
            pages = other.pages[:hit]
        request = Request(prompt, list(pages), hit * PAGE)
        for page in pages:
            self.users[page] += 1
        self.running.append(request)
        if not self.take(request, prompt):
            self.end(request)

    def step(self) -> None:
        """One engine step: decode rows with up to three drafts, then chunks of prompts."""
        decode, chunks = [], []
        for request in list(self.running):
            if request.computed < request.prompt:
                chunks.append((request, min(request.prompt - request.computed, self.rnd.choice((16, 40, 64)))))
            elif self.rnd.random() < 0.9 and self.take(request, request.computed + 4):
                decode.append((request, self.rnd.randint(1, 4)))
        if decode:
            found = self.slots.decode(batch(decode))
            for (request, m), slot in zip(decode, found.tolist()):
                self.steps += 1
                if slot == self.slots.count:
                    self.lost += 1
                else:
                    assert slot == request.slot, "another request's state"
                request.computed += self.rnd.randint(1, m)  # the other drafts are rejected
        if chunks:
            slots, _ = self.slots.prompt(batch(chunks))
            taken = [s for s in slots.tolist() if s < self.slots.count]
            assert len(set(taken)) == len(taken)
            for (request, m), slot in zip(chunks, slots.tolist()):
                request.slot = slot
                request.computed += m
        live = [r.slot for r in self.running if r.slot is not None and r.computed >= r.prompt]
        assert len(set(live)) == len(live) or self.slots.count < 20


@pytest.mark.parametrize("seed", range(6))
def test_random_histories(seed: int) -> None:
    """With room for all, every decode step finds the slot of its own prompt; with too few, its own or none."""
    for count in (24, 4):
        s = Scheduler(seed, count)
        for _ in range(300):
            if len(s.running) < 6 and s.rnd.random() < 0.4:
                s.arrive()
            if s.running and s.rnd.random() < 0.08:
                s.end(s.rnd.choice(s.running))
            s.step()
            for request in [r for r in s.running if r.computed > 250]:
                s.end(request)
        assert s.steps > 500
        assert s.lost == 0 if count == 24 else s.lost > 0


def test_a_chunk_inherits_from_the_one_before() -> None:
    slots = RequestSlots(8, PAGE, "cpu")
    slots.fit(POOL)
    request = Request(100, [5, 6, 7, 8, 9, 10, 11], 0)
    first, none = slots.prompt(batch([(request, 64)]))
    assert none.tolist() == [8]
    request.computed = 64
    second, source = slots.prompt(batch([(request, 36)]))
    assert source.tolist() == first.tolist()
    request.computed = 100
    assert slots.decode(batch([(request, 1)])).tolist() == second.tolist()


def test_requests_left_out_of_a_batch_have_no_slot() -> None:
    """On CPUs a batch keeps the tokens of rows that another call serves: no keys, no slots in the cache."""
    slots = RequestSlots(8, PAGE, "cpu")
    slots.fit(POOL)
    mine, other = Request(40, [1, 2, 3], 0), Request(70, [4, 5, 6, 7, 8], 0)
    b = batch([(mine, 40), (other, 70)])
    b.seq_lens[1] = 0
    b.slot_mapping[40:] = -1
    new, _ = slots.prompt(b)
    assert new[1] == 8
    mine.computed = 40
    b = batch([(mine, 1), (other, 70)])
    b.seq_lens[1] = 0
    b.slot_mapping[1:] = -1
    assert slots.decode(b).tolist() == [new[0].item(), 8]


def test_warm_up_rows_have_no_slot() -> None:
    slots = RequestSlots(8, PAGE, "cpu")
    slots.fit(POOL)
    b = batch([(Request(1, [0], 0), 1)])
    b.slot_mapping.fill_(-1)
    assert slots.decode(b).tolist() == [8]
    assert (slots.owner == -1).all()
