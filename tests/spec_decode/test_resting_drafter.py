"""A look-up drafter whose drafts are turned off does nothing in a step, and then catches up with the text."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_ext.spec_decode.tables import LookupDrafter, LookupSettings


@pytest.mark.parametrize("hedge", ["", "request"])
def test_a_rested_drafter_catches_up(hedge: str) -> None:
    rng = np.random.default_rng(0)
    text = np.concatenate([part := rng.integers(9, size=40), part, part]).astype(np.int32)[None]
    settings = LookupSettings(requests=1, window=128, drafts=4, hedge=hedge)
    found = []
    for rests in (False, True):
        drafter = LookupDrafter(settings)
        drafter.add("a", text[0, :10].tolist(), 10)
        for length in range(11, 100):
            wanted = 0 if rests and 30 < length < 90 else None
            if drafter.rests(wanted, np.zeros(1, np.int32)):
                assert wanted == 0
                continue
            drafts = np.zeros((1, 4), np.int64)
            drafter.step(drafter.rows(["a"], [0], [length], [0]), text, drafts, np.zeros(1, np.int32))
        found.append(drafts.tolist())
    assert found[0] == found[1] == [text[0, 99:103].tolist()]


def test_what_has_to_be_counted_or_recorded_is_a_step() -> None:
    drafter = LookupDrafter(LookupSettings(requests=1, window=128, drafts=4, shared=1000))
    drafter.add("a", [1, 2, 3], 3)
    assert drafter.rests(0, None)
    assert not drafter.rests(None, None)
    assert not drafter.rests(2, np.zeros(1, np.int32))
    assert not drafter.rests(0, np.array([0, 4]))
    drafter.remove("a")
    assert not drafter.rests(0, None)
