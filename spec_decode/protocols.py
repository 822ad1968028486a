"""What a speculation method is made of: Drafter, Verifier, LengthPolicy and Selector, and the tensors they share.

A step: the Selector names a Drafter for each request, the Drafter proposes up to K tokens, the LengthPolicy says how
many of them are verified, the target model scores them in one forward, the Verifier accepts a prefix and adds one
token. Any combination runs. No vLLM here; a drafter and a verifier never see each other.

What keeps a combination lossless: lengths and selections depend on verified tokens, draft-side scores, timings and own
random numbers only, never on this step's target logits; `draft_logits` is the law that the drafts were drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class VerifyBatch:
    """The target's scores of one step's drafts, R requests flattened to T rows.

    Request r owns rows `cu_rows[r] .. cu_rows[r + 1] - 1`: one per draft, then the bonus row. Row i of a request scores
    the token that follows its first i drafts. A request without drafts owns one row.

    Attributes:
        logits: [T, V] float32, after penalties, grammar, temperature, min-p, top-k and top-p; rows of greedy requests
            (temperature 0) are as the model gave them, and their law is the argmax, ties to the lower token.
        drafts: [T] int64, the draft that row t judges; -1 in bonus rows and where a draft must not be accepted.
        cu_rows: [R + 1] int32.
        row_request: [T] int32, the request that owns a row.
        temperature: [R] float32, 0 = greedy.
        seeds: [R] int64 and positions: [T] int64, the key of a row's random numbers: position of the row's input token.
        draft_logits: [D, V], the drafter's logits *before* temperature, any float dtype; None = deterministic drafts.
        draft_row: [T] int64, the row of `draft_logits` that draft t was drawn from; -1 = deterministic (one-hot).
            The law is softmax(draft_logits / draft_temperature), the argmax where that temperature is 0.
        draft_temperature: [R] float32.
        max_drafts: K, the most drafts that a request can have; a Python number.
    """

    logits: torch.Tensor
    drafts: torch.Tensor
    cu_rows: torch.Tensor
    row_request: torch.Tensor
    temperature: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    draft_logits: torch.Tensor | None
    draft_row: torch.Tensor | None
    draft_temperature: torch.Tensor
    max_drafts: int


@runtime_checkable
class Verifier(Protocol):
    """Accepts a prefix of each request's drafts and adds one token.

    Attributes:
        lossless: whether the output follows the target's law exactly.
        needs_draft_law: whether the rule is void on deterministic drafts.
    """

    lossless: bool
    needs_draft_law: bool

    def verify(self, batch: VerifyBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens [R, K + 1] int64, count [R] int32): the first `count` tokens of a row are emitted, the rest is void.

        `tokens[r, :count - 1]` are the first drafts of r (a lossy rule may differ); a request with K_r drafts emits
        1 .. K_r + 1 tokens. Fixed launches, no read-back to the host.
        """
        ...


class Drafter(Protocol):
    """A deterministic drafter on the host: continues a request's text from texts that it has seen.

    `tables.LookupDrafter` is the one implementation; drafters with a model are speculators of vLLM (`v2_model`).
    """

    def add(self, request: str, tokens: Sequence[int], prompt: int, tenant: str | None = None) -> None:
        """A request begins with `tokens`, `prompt` of them its prompt; tenants never see each other's texts."""
        ...

    def remove(self, request: str, finished: bool = True) -> None:
        """A request has ended, or is preempted (`finished=False`)."""
        ...

    def rows(self, requests: Sequence[str], rows: Any, lengths: Any, verified: Any) -> np.ndarray:
        """The table of a step: where each request's text is and how long it is now (0 = propose nothing)."""
        ...

    def step(self, table: np.ndarray, tokens: np.ndarray, drafts: np.ndarray, matched: np.ndarray) -> None:
        """Take in what was verified since the last step, then propose.

        Args:
            table: [R, 5] int64, from `rows`.
            tokens: [rows, length] int32, verified texts.
            drafts: [R, K] int64, written: proposals, padded with the last token of the text.
            matched: [R] int32, written: length of the context that the proposal rests on; 0 = none.
        """
        ...


@dataclass(frozen=True)
class LengthInput:
    """What a length policy may know when a step is scheduled; B requests that decode, on the host.

    Attributes:
        survival: [B, K] float64, estimated probability that the first k + 1 drafts are all accepted, non-increasing.
        context: [B] int64, tokens in the KV cache.
        choices: ascending draft counts that are captured as graphs; 0 is always among them.
        uniform: whether all requests must get the same count (it keeps the step a full graph).
    """

    survival: np.ndarray
    context: np.ndarray
    choices: tuple[int, ...]
    uniform: bool


class LengthPolicy(Protocol):
    """How many drafts each request gets in the next step."""

    def choose(self, known: LengthInput) -> np.ndarray:
        """[B] int64: if `known.uniform` all the same, one of `known.choices`; else up to the largest of them."""
        ...

    def observe(self, drafted: np.ndarray, accepted: np.ndarray, seconds: float) -> None:
        """Outcome of a step: [B] int64 drafts verified and accepted, wall-clock seconds since the previous step."""
        ...


class Selector(Protocol):
    """Which of N drafters serves a request. Full information: every drafter is scored on every verified token."""

    def pick(self, key: int) -> int:
        """The drafter of the next step, 0 .. N - 1, for a request or tenant `key`."""
        ...

    def update(self, key: int, acceptance: np.ndarray) -> None:
        """[t, N] float64: for each newly verified token, the probability that drafter n's draft there is accepted."""
        ...

    def finish(self, key: int) -> None:
        """The request has ended: open rounds are dropped, its state is freed."""
        ...
