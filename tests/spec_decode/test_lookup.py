"""The look-up drafters: what they propose, whose text it is, and what they count."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest
import torch

from vllm_ext.spec_decode import lookup
from vllm_ext.spec_decode import stream as stream_module
from vllm_ext.spec_decode.stream import StreamStep
from vllm_ext.spec_decode.tables import IN_FLIGHT, LookupDrafter, LookupSettings

K = 4


def pointer(words: np.ndarray):
    return words.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))


class Texts:
    """Requests whose texts grow token by token, with a drafter that follows them."""

    def __init__(self, rows: int = 4, **settings) -> None:
        self.drafter = LookupDrafter(LookupSettings(K, rows, **({"window": 512} | settings)))
        self.tokens = np.zeros((rows, 600), np.int32)
        self.lengths = [0] * rows
        self.names = [""] * rows

    def add(self, row: int, name: str, prompt: list[int], tenant: str | None = None) -> None:
        self.names[row], self.lengths[row] = name, len(prompt)
        self.tokens[row, : len(prompt)] = prompt
        self.drafter.add(name, prompt, len(prompt), tenant)

    def grow(self, row: int, new: list[int]) -> None:
        self.tokens[row, self.lengths[row] : self.lengths[row] + len(new)] = new
        self.lengths[row] += len(new)

    def step(self, rows: list[int], verified: int = 0, judged=None) -> tuple[list[list[int]], list[int]]:
        """(drafts, match lengths) of some rows."""
        table = self.drafter.rows(
            [self.names[r] for r in rows], rows, [self.lengths[r] for r in rows], [verified] * len(rows)
        )
        drafts, matched = np.zeros((len(table), K), np.int64), np.zeros(len(table), np.int32)
        self.drafter.step(table, self.tokens, drafts, matched, judged)
        return drafts[: len(rows)].tolist(), matched[: len(rows)].tolist()


def test_continues_the_most_recent_occurrence_or_the_first():
    text = [1, 2, 3, 9, 9, 1, 2, 4, 8, 8, 1, 2]
    for arm, want in (("longest", [4, 8, 8, 1]), ("first", [3, 9, 9, 1])):
        texts = Texts(arms=(arm,))
        texts.add(0, "a", text)
        assert texts.step([0]) == ([want], [2])


def test_short_periods_are_copied_on():
    texts = Texts()
    texts.add(0, "a", [7, 1, 2, 1, 2])
    assert texts.step([0]) == ([[1, 2, 1, 2]], [2])


def test_no_match_pads_with_the_last_token():
    texts = Texts()
    texts.add(0, "a", [1, 2, 3])
    assert texts.step([0]) == ([[3, 3, 3, 3]], [0])


def test_ngram_looks_at_few_tokens_only():
    """The longest suffix was continued by 5; its last two tokens, more recently, by 6."""
    text = [1, 2, 3, 5, 0, 2, 3, 6, 0, 1, 2, 3]
    for arms, want in ((("longest",), 5), (("ngram",), 6)):
        texts = Texts(arms=arms, ngram=2)
        texts.add(0, "a", text)
        assert texts.step([0])[0][0][0] == want


def test_a_request_that_is_set_back_forgets():
    texts = Texts()
    texts.add(0, "a", [1, 2, 3, 1, 2])
    texts.step([0])
    texts.grow(0, [3, 9])
    texts.step([0])
    texts.lengths[0] = 5
    assert texts.step([0])[0][0][0] == 3
    texts.grow(0, [4, 1, 2])
    assert texts.step([0])[0][0][0] == 4


def test_the_window_forgets_the_beginning():
    texts = Texts(window=16)
    texts.add(0, "a", [1, 2, 3, *range(20, 34)])
    texts.grow(0, [1, 2])
    assert texts.step([0])[1] == [0]
    texts.grow(0, [30])
    assert texts.step([0])[0][0][:2] == [31, 32]


def finish(texts: Texts, row: int, output: list[int]) -> None:
    """Let a request generate `output`, then end."""
    texts.grow(row, output)
    texts.step([row])
    texts.drafter.remove(texts.names[row])


def test_finished_outputs_are_shared_within_a_tenant_only():
    """The second tenant never sees the first one's words, in whatever order requests come and go."""
    texts = Texts(shared=2000, arms=("longest", "shared"), handicap=0)
    texts.add(0, "a", [1], "blue")
    finish(texts, 0, [50, 51, 52, 53, 54])
    for row, tenant in ((1, "blue"), (2, "red"), (3, None)):
        texts.add(row, str(row), [50], tenant)
        texts.grow(row, [51])
    drafts, matched = texts.step([1, 2, 3])
    assert (drafts[0], matched[0]) == ([52, 53, 54, 54], 2)
    assert matched[1:] == [0, 0]


def test_no_tenant_is_ever_offered_anothers_tokens():
    """Random traffic of three tenants over disjoint vocabularies, through many changes of generation."""
    rnd = random.Random(0)
    texts = Texts(shared=200, arms=("longest", "shared"), handicap=0)
    owner = [0] * 4
    for step in range(600):
        for row in range(4):
            if not texts.names[row] or rnd.random() < 0.1 or texts.lengths[row] > 500:
                texts.drafter.remove(texts.names[row])
                owner[row] = rnd.randrange(3)
                texts.add(row, f"{row}-{step}", [100 * owner[row] + rnd.randrange(5)], f"tenant {owner[row]}")
            texts.grow(row, [100 * owner[row] + rnd.randrange(5) for _ in range(rnd.randint(1, 3))])
        drafts, _ = texts.step([0, 1, 2, 3])
        assert all(token // 100 == owner[row] for row in range(4) for token in drafts[row])
    assert texts.drafter.shared[5][1] > 10  # generations were dropped on the way
    assert texts.drafter.counters[lookup.SHARED].sum() == 0  # nothing was said to be verified


def test_shared_memory_is_bounded_and_keeps_the_recent_texts():
    texts = Texts(shared=400, arms=("shared",), handicap=0)
    for i in range(100):
        texts.add(0, str(i), [1])
        finish(texts, 0, [1000 + 10 * i + j for j in range(9)])
    texts.add(0, "last", [1000 + 10 * 99])
    texts.grow(0, [1000 + 10 * 99 + 1])
    assert texts.step([0])[0][0][0] == 1000 + 10 * 99 + 2
    texts.add(1, "first", [1000])
    texts.grow(1, [1001])
    assert texts.step([1])[1] == [0]


def test_a_million_shared_tokens():
    """Outputs of five tenants through several changes of generation: no slower at the end, no byte more, and found."""
    rng = np.random.default_rng(0)
    texts = Texts(shared=1_000_000, arms=("longest", "shared"), handicap=0)

    def memory() -> int:
        return sum(a.nbytes for a in (*texts.drafter.shared, *texts.drafter.local))

    before, times, fed, output = memory(), [], 0, []
    for i in range(3000):
        output = np.minimum(rng.zipf(1.3, 400), 49151).tolist()
        texts.add(0, str(i), [1], f"tenant {i % 5}")
        began = texts.drafter.seconds[0]
        finish(texts, 0, output)
        times.append(texts.drafter.seconds[0] - began)
        fed += len(output)
    texts.step([])
    assert fed > 1_000_000
    assert texts.drafter.shared[5][1] >= 2  # generations dropped
    assert memory() == before
    assert np.median(times[-300:]) < 3 * np.median(times[100:400])
    texts.add(1, "next", output[:8], "tenant 4")
    texts.add(2, "other", output[:8], "tenant 3")
    texts.grow(1, output[8:12])
    texts.grow(2, output[8:12])
    drafts, matched = texts.step([1, 2])
    assert drafts[0] == output[12 : 12 + K]
    assert matched[0] == 12 > matched[1]


def test_slots_rest_while_steps_may_still_run():
    """A slot is not given on for some steps; there are enough for full batches that come and go."""
    drafter = LookupDrafter(LookupSettings(K, 4, 64))
    drafter.add("a", [1], 1)
    used = drafter._slots["a"]
    drafter.remove("a")
    for step in range(IN_FLIGHT):
        drafter.rows([], [], [], [])
        drafter.add(str(step), [1], 1)
        assert drafter._slots[str(step)] != used
        drafter.remove(str(step))


def test_a_whole_batch_may_change_at_once():
    """More slots are wanted than have rested: the drafter waits for its steps, and no output is recorded half."""
    waited = []
    drafter = LookupDrafter(LookupSettings(K, 4, 64, shared=100))
    drafter.settle = lambda: waited.append(True)
    for batch in range(5):
        for i in range(4):
            drafter.add(f"{batch}-{i}", [1, 2], 2)
        drafter.rows([f"{batch}-{i}" for i in range(4)], range(4), [0] * 4, [0] * 4)
        for i in range(4):
            drafter.remove(f"{batch}-{i}")
    assert waited
    for i in range(4):
        drafter.add(f"last-{i}", [1], 1)
    assert not set(drafter._slots.values()) & set(drafter._retired)


def test_counters():
    texts = Texts()
    texts.add(0, "a", [1, 2, 3, 4, 1, 2])
    assert texts.step([0])[0] == [[3, 4, 1, 2]]
    texts.grow(0, [3, 4, 9])
    texts.step([0], verified=4)
    assert texts.drafter.counters[lookup.LONGEST].tolist() == [1, 4, 2, 1, 1, 0, 0]


@pytest.mark.parametrize("scope", ["request", "tenant"])
def test_hedge_learns_which_arm_is_right(scope):
    """The most recent continuation is right, the first one never; a tenant's next request knows it from the start."""
    texts = Texts(arms=("first", "longest"), hedge=scope)

    def phrase(i: int) -> list[int]:
        return [1, 2, 3 + i // 2]  # each continuation is said twice: the second time the most recent one is right

    texts.add(0, "a", phrase(0))
    for i in range(1, 60):
        for token in phrase(i):
            texts.grow(0, [token])
            texts.step([0])
    slot = texts.drafter._slots["a"]
    first, longest = texts.drafter.hedge[0][slot, 2:4]
    assert longest > 0.8 > first
    texts.drafter.remove("a")
    texts.add(0, "b", phrase(60))
    slot = texts.drafter._slots["b"]
    assert (texts.drafter.hedge[0][slot, 3] > 0.8) == (scope == "tenant")


def test_hedge_yields_to_a_model_that_is_right():
    """Look-ups are wrong at every token. A match length of 0 leaves the row to the model, and counts as its draft."""
    texts = Texts(arms=("model", "longest"), hedge="request", model=True)
    texts.add(0, "a", [1, 2])
    for i in range(40):
        texts.grow(0, [1 if i % 2 else 100 + i])
        _, matched = texts.step([0], verified=1, judged=np.ones((1, 1), np.int32))
    assert matched == [0]
    slot = texts.drafter._slots["a"]
    assert texts.drafter.hedge[0][slot, 2] > 0.9
    assert texts.drafter.counters[lookup.MODEL, 0] > 20
    before = texts.drafter.hedge[1][slot, 0]
    texts.grow(0, [5])
    texts.step([0])  # the model was not asked: nobody is scored
    assert texts.drafter.hedge[1][slot, 0] == before


@pytest.mark.parametrize("called", ["function", "address"])
def test_stream_step_reads_the_same_arrays(monkeypatch, called):
    """What a CUDA stream would call, called here: addresses and shapes in a block lead to the same drafts."""
    if called == "address":  # as the driver does
        monkeypatch.setattr(stream_module, "run_block", lambda words: stream_module._callback.ctypes(pointer(words)))
    texts = Texts(shared=300, arms=("longest", "first", "ngram", "shared"), hedge="request")
    other = Texts(shared=300, arms=("longest", "first", "ngram", "shared"), hedge="request")
    total = torch.zeros(4, dtype=torch.int32)
    stream = StreamStep(other.drafter, texts.tokens, total)
    rnd = random.Random(3)
    drafts, matched = torch.zeros(2, K, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    for step in range(40):
        for row in range(2):
            if step % 13 == 5 * row:
                for t in (texts, other):
                    t.drafter.remove(t.names[row])
                    t.add(row, f"{row}-{step}", [1, 2, 1])
            texts.grow(row, [rnd.randrange(3) for _ in range(rnd.randint(1, 3))])
        want = texts.step([0, 1], verified=K)
        total[:2] = torch.tensor(texts.lengths[:2], dtype=torch.int32)
        table = other.drafter.rows(other.names[:2], [0, 1], 0, [K, K])
        stream.run(table, 2, torch.ones(2, dtype=torch.int32), drafts, matched)
        assert (drafts.tolist(), matched.tolist()) == want
    assert other.drafter.counters.tolist() == texts.drafter.counters.tolist()
    assert other.drafter.seconds[0] > 0


def replay(text: list[int], prompt: int, **settings) -> int:
    """Steps that a recorded text takes with greedy verification of K drafts a step."""
    drafter = LookupDrafter(LookupSettings(K, 1, 8192, **settings))
    tokens = np.zeros((1, len(text)), np.int32)
    tokens[0] = text
    drafter.add("a", text[:prompt], prompt)
    length, steps = prompt + 1, 0
    while length < len(text):
        drafts, matched = np.zeros((1, K), np.int64), np.zeros(1, np.int32)
        drafter.step(drafter.rows(["a"], [0], [length], [K]), tokens, drafts, matched)
        accepted = 0
        while accepted < K and length + accepted < len(text) and drafts[0, accepted] == text[length + accepted]:
            accepted += 1
        length, steps = length + accepted + 1, steps + 1
    return steps


@pytest.mark.parametrize("kind", ["code", "prose", "agent", "mixed"])
def test_hedge_is_close_to_the_best_arm_on_recorded_texts(kind):
    """At most 5 % more steps than the best arm alone, on code with a repeat, prose, tool calls and a mix of them."""
    import inspect
    import json
    import statistics

    from vllm_ext.evaluation import corpus

    rnd = random.Random(0)
    source = inspect.getsource(statistics.NormalDist)[:2000]
    prose = corpus.load()[:3000]
    calls = "".join(json.dumps({"tool": "find", "arguments": {"q": rnd.randrange(10**6), "id": i}}) for i in range(40))
    text = {
        "code": source + source.replace("mu", "mean"),
        "prose": prose + prose[500:1500],
        "agent": calls,
        "mixed": source[:1000] + calls[:1000] + prose[:1000] + calls[1000:] + source.replace("mu", "mean"),
    }[kind]
    tokens = [ord(c) % 256 for c in text]
    arms = ("longest", "first", "ngram")
    best = min(replay(tokens, 200, arms=(arm,), ngram=3) for arm in arms)
    assert replay(tokens, 200, arms=arms, ngram=3, hedge="request") <= 1.05 * best
