"""Memory and bookkeeping of the look-up drafters in one worker: which automaton belongs to which request.

`LookupDrafter` is used synchronously (model runner V1, CPUs). On a GPU under runner V2 `stream.StreamDrafter` runs the
same step in stream order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vllm_ext.spec_decode import automaton, lookup, normal_hedge

REQUEST = ("slot", "row", "length", "verified", "retired")
IN_FLIGHT = 4
"""Steps for which a slot that a request has left is not given to another: a step may still be running with it."""


@dataclass(frozen=True)
class LookupSettings:
    """What the look-up drafters of a worker need to know.

    Attributes:
        drafts: K, tokens proposed for a request.
        requests: most requests at a time.
        window: tokens of a request that its automaton holds; half of them are forgotten when it is full.
        shared: tokens of finished outputs that are kept, in two generations; 0 = none.
        arms: names out of `lookup.ARMS`.
        ngram: longest suffix that the arm `ngram` looks for.
        handicap: by how many tokens a match in finished outputs must be longer than one in the request's own text.
        min_match: shortest match that is used.
        model: whether a model drafts where no look-up does.
        hedge: choose the arm by NormalHedge weights: "" = no, "request" or "tenant" = whose record counts.
    """

    drafts: int
    requests: int
    window: int
    shared: int = 0
    arms: tuple[str, ...] = ("longest",)
    ngram: int = 4
    handicap: int = 5
    min_match: int = 1
    hedge: str = ""
    model: bool = False


class LookupDrafter:
    """The look-up drafters of one worker; all methods are called from one thread."""

    def __init__(self, settings: LookupSettings) -> None:
        self.settings = settings
        slots = settings.requests + 2 * IN_FLIGHT + settings.requests // 2
        self.local = (
            *automaton.arrays(settings.window, (slots,)),
            np.zeros((slots, settings.window), np.int32),
            np.zeros((slots, lookup.CURSOR + 8), np.int64),
        )
        half = max(settings.shared // 2, 8)
        self.shared = (
            *automaton.arrays(half, (2,)),
            np.full((2, half), -1, np.int32),
            np.zeros(2, np.int64),
        )
        for g in range(2):
            automaton.clear(self.shared[0][g], self.shared[2][g], self.shared[3][g])
        horizon = settings.drafts if settings.hedge else 0
        self.numbers = np.array(
            [settings.ngram, settings.handicap, settings.min_match, settings.shared > 0, horizon, settings.model],
            np.int64,
        )
        self.arms = np.array([lookup.ARMS.index(a) for a in settings.arms], np.int64)
        self.counters = np.zeros((len(lookup.ARMS), 3 + settings.drafts), np.int64)
        floats, ints = normal_hedge.state_size(len(settings.arms), max(horizon, 1))
        self.hedge = (
            np.zeros((slots, floats)),
            np.zeros((slots, ints), np.int64),
            np.ones(len(settings.arms)),
            np.zeros(len(settings.arms)),
        )
        self.seconds = np.zeros(1)
        self._regret: dict[int, np.ndarray] = {}
        self._free: deque[tuple[int, int]] = deque((s, -IN_FLIGHT - 1) for s in range(slots))
        self._slots: dict[str, int] = {}
        self._retired: list[int] = []
        self._tenants: dict[str, int] = {}
        self._step = 0
        self.settle: Callable[[], None] = lambda: None
        """Waits until no step is running; nothing to do where steps are synchronous."""

    @property
    def slots(self) -> int:
        """How many automata there are."""
        return int(self.local[3].shape[0])

    def compile(self) -> None:
        """Compile the step now, not while the first request waits."""
        scratch = LookupDrafter(replace(self.settings, requests=1, window=8, shared=min(self.settings.shared, 64)))
        scratch.add("", [1], 1)
        table = scratch.rows([""], 0, 1, 0)
        drafts = np.zeros((1, self.settings.drafts), np.int64)
        scratch.step(table, np.ones((1, 8), np.int32), drafts, np.zeros(1, np.int32))

    def add(self, request: str, tokens: Sequence[int], prompt: int, tenant: str | None = None) -> None:
        """A request begins (or begins again, after preemption) with `tokens`, the first `prompt` of them its prompt.

        Texts of finished requests are shared between requests of the same tenant only; None is a tenant of its own.
        """
        self.remove(request, finished=False)
        slot, since = self._free.popleft()
        if self._step - since <= IN_FLIGHT:  # most of the batch has changed at once
            self.settle()
        if slot in self._retired:  # it is needed before its output could be recorded
            self._retired.remove(slot)
        self._slots[request] = slot
        number = self._tenants.setdefault("" if tenant is None else "=" + tenant, len(self._tenants))
        lookup.ingest(self.local, slot, np.asarray(tokens, np.int32), prompt, number)
        if self.settings.hedge:
            n, state = len(self.arms), self.hedge[0][slot]
            normal_hedge.reset(state, self.hedge[1][slot], n)
            if number in self._regret:
                state[:n] = self._regret[number]
                normal_hedge.weights(state[:n], state[n : 2 * n])

    def remove(self, request: str, finished: bool = True) -> None:
        """A request has ended; its output is recorded at the next step if texts are shared."""
        slot = self._slots.pop(request, None)
        if slot is None:
            return
        if finished and self.settings.shared:
            self._retired.append(slot)
        if self.settings.hedge == "tenant":
            self._regret[int(self.local[5][slot, lookup.TENANT])] = self.hedge[0][slot, : len(self.arms)].copy()
        self._free.append((slot, self._step))

    def known(self, request: str) -> bool:
        """Whether the request has a slot."""
        return request in self._slots

    def running(self) -> list[str]:
        """The requests that have slots."""
        return list(self._slots)

    def rows(self, requests: Sequence[str], rows: Any, lengths: Any, verified: Any) -> np.ndarray:
        """[R', 5] int64, the table that `lookup.step` takes: one row a request, then slots to record that found no row.

        Args:
            requests: ids; one that is not known proposes nothing.
            rows, lengths, verified: [R] integers, see `lookup.step`.
        """
        self._step += 1
        retired, self._retired = self._retired, []
        table = np.full((max(len(requests), len(retired)), len(REQUEST)), -1, np.int64)
        table[:, 1:4] = 0
        for r, request in enumerate(requests):
            table[r, 0] = self._slots.get(request, -1)
        n = len(requests)
        table[:n, 1], table[:n, 2], table[:n, 3] = rows, lengths, verified
        table[: len(retired), 4] = retired
        return table

    def rests(self, wanted: int | None, verified: np.ndarray | None) -> bool:
        """Can this step be left out? The next one then takes in what was verified meanwhile.

        Args:
            wanted: drafts a request that the step is asked for; None = all.
            verified: drafts that it has verified, by request; None = none.
        """
        if wanted != 0 or self._retired or (verified is not None and verified.any()):
            return False
        self._step += 1
        return True

    def step(
        self,
        table: np.ndarray,
        tokens: np.ndarray,
        drafts: np.ndarray,
        matched: np.ndarray,
        judged: np.ndarray | None = None,
    ) -> None:
        """Run `lookup.step`; `drafts`, `matched` and `judged` have as many rows as `table`."""
        if judged is None:
            judged = np.full((len(table), 1), -1, np.int32)
        began = time.perf_counter()
        parts = (self.local, self.shared, self.numbers, self.arms, self.hedge)
        lookup.step(*parts, table, tokens, judged, drafts, matched, self.counters)
        self.seconds[0] += time.perf_counter() - began
