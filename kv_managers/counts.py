"""How many tokens of a request are resident: a pure function of counts, shared by scheduler and worker.

A request of `prompt` tokens of which `n` have been computed keeps, in every layer and KV head of one KV-cache group,

    [0, n)                  before its first eviction,
    [boundary - kept, n)    after it; the survivors of [0, boundary) lie in the last `kept` slots below the boundary.

The resident slots are always a contiguous end of the request's block table, so the blocks before them can be freed and
the stock attention kernel reads a shifted table. Data decides which tokens survive, never how many; nothing has to be
reported back from the worker, and asynchronous scheduling stays safe.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_ext.kv_managers.method import KVMethod


@dataclass(frozen=True)
class Counts:
    """Counts of one KV-cache group.

    Attributes:
        method: budget, trigger, stride, block size.
        share: budget of this group's layers relative to the method's.
    """

    method: KVMethod
    share: float = 1.0

    def kept(self, prompt: int) -> int:
        """Tokens that survive an eviction, a multiple of the block size."""
        block = self.method.block_size
        whole = self.method.budget_for(prompt)
        least = -(-(self.method.sinks + self.method.window) // block) * block
        return whole if self.share == 1.0 else max(least, round(whole * self.share / block) * block)

    def boundary(self, n: int, prompt: int) -> int:
        """Tokens [0, boundary) have been reduced to `kept`; 0 = nothing evicted yet."""
        m, kept = self.method, self.kept(prompt)
        if m.trigger == "streaming":
            found = n // m.stride * m.stride
            return found if found > kept else 0
        if n < prompt:
            return 0
        found = prompt // m.block_size * m.block_size
        if m.trigger == "decode":
            found += (n - found) // m.stride * m.stride
        return found if found > kept else 0

    def start(self, n: int, prompt: int) -> int:
        """First resident slot once `n` tokens are computed; a multiple of the block size, never falling with `n`."""
        found = self.boundary(n, prompt)
        return found - self.kept(prompt) if found else 0

    def first_event(self, prompt: int) -> int | None:
        """Computed tokens after which the first eviction happens; None = never."""
        m, kept = self.method, self.kept(prompt)
        if m.trigger == "streaming":
            return (kept // m.stride + 1) * m.stride
        end = prompt // m.block_size * m.block_size
        if end > kept:
            return prompt
        return end + ((kept - end) // m.stride + 1) * m.stride if m.trigger == "decode" else None

    def publishable(self, prompt: int) -> int | None:
        """Tokens whose blocks may enter the prefix cache; None = all.

        Their keys are computed before anything was evicted, and no eviction ever writes into their blocks.
        """
        first = self.first_event(prompt)
        return None if first is None else self.start(first, prompt)

    def longest_hit(self, prompt: int) -> int | None:
        """Most tokens that a new request may take from the prefix cache; None = any number.

        What eviction writes to stays private, and the queries that score are computed by this request. A prompt that is
        evicted inside takes none: what it keeps depends on where it is cut into chunks, and a hit would move the cuts.
        """
        first = self.first_event(prompt)
        if first is None:
            return None
        if first < prompt:
            return 0
        return max(0, min(self.start(first, prompt), first - self.method.window))

    def most_resident(self, longest: int, in_flight: int) -> int:
        """Upper bound of the slots that one request ever holds.

        Args:
            longest: longest request, in tokens.
            in_flight: tokens that may be scheduled before the blocks of an eviction are free.
        """
        m = self.method
        if m.trigger != "streaming":
            return longest  # the prompt is resident as a whole until it ends
        return min(longest, self.kept(longest) + m.stride + in_flight)
