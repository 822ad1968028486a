"""Parts of the drafters with a model that need no engine."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from vllm_ext.spec_decode import v2_model


def test_a_model_is_judged_on_the_tokens_just_verified():
    """Two requests, K = 2: one had a draft accepted (two new tokens), one is a prompt whose first token was sampled.

    The pass over the verified tokens holds, for each request, its inputs, the new token, and rejected drafts.
    """
    inputs = torch.tensor([4, 5, 6, 9, 1, 2, 7], dtype=torch.int32)  # [4, 5 | 6 new, 9 rejected], [1, 2 | 7 new]
    best = torch.tensor([5, 8, 0, 0, 0, 7, 0])  # after 4 the model says 5 (right), after 5 it says 8 (wrong)
    fake = SimpleNamespace(
        last_token_indices=torch.tensor([2, 6]),
        offsets=torch.arange(3),
        expanded_input_ids=inputs,
        _hidden=best[:, None].float(),
        compute_draft_logits=lambda hidden, step: torch.nn.functional.one_hot(hidden[:, 0].long(), 10).float(),
    )
    judged = v2_model._WithLookups._judge(fake, torch.tensor([2, 1], dtype=torch.int32))
    assert judged.tolist() == [[1, 0, -1], [1, -1, -1]]
    assert v2_model._WithLookups._judge(fake, torch.tensor([0, 1])).tolist()[0] == [-1, -1, -1]


def test_a_looked_up_draft_is_certain():
    """The stored law of a replaced row has one token; the other rows, and other requests, keep theirs."""
    law = torch.randn(4, 2, 5)
    fake = SimpleNamespace(draft_logits=law.clone())
    slots, found = torch.tensor([3, 1]), torch.tensor([[0, 4], [2, 2]])
    v2_model._WithLookups._make_certain(fake, slots, found, torch.tensor([[True], [False]]))
    assert fake.draft_logits[3].softmax(-1).tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert torch.equal(fake.draft_logits[[0, 1, 2]], law[[0, 1, 2]])
