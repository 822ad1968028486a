"""Evictions while requests are preempted, mixed and shuffled, in CPU engines; and what a server without them runs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_engines import SMALL, Checker, core, generate, leaked, start, tokens

from vllm_ext.kv_managers.compactor import Compactor
from vllm_ext.kv_managers.snapkv import SnapKV

pytestmark = pytest.mark.engine

PROMPT, OUTPUT = 200, 24
CLOSE = 5e-5
"""fp32 against fp64, sums of up to 340 keys."""


@pytest.fixture(scope="module")
def evicting(tiny_model: Path) -> Iterator[tuple[Any, Checker]]:
    """SnapKV with every step's attention compared with its definition."""
    with (
        pytest.MonkeyPatch.context() as patch,
        start(tiny_model, {"snapkv": SMALL}, max_num_batched_tokens=128, max_num_seqs=64) as llm,
    ):
        yield llm, Checker(patch, SnapKV)


def serve(llm: Any, prompt: list[int], name: str, preempt_before: int | None = None) -> list[int]:
    """Tokens of one request, all whose blocks are taken away before a step."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
    done: list[int] = []
    step = 0
    while llm.llm_engine.has_unfinished_requests():
        if step == preempt_before:
            llm.reset_prefix_cache(reset_running_requests=True)
            assert leaked(llm) == 0
        for output in llm.llm_engine.step():
            done = list(output.outputs[0].token_ids)
        step += 1
    assert len(done) == OUTPUT
    return done


def kept_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.Tensor]]:
    """Request -> survivors of its evictions, filled as an engine runs."""
    found: dict[str, list[torch.Tensor]] = {}
    choose = Compactor._choose

    def noting(self: Any, batch: Any, *rest: Any) -> torch.Tensor:
        survivors = choose(self, batch, *rest)
        names = {id(request): name for name, request in self.requests.items()}
        for one, kept in zip(batch, survivors):
            found.setdefault(names[id(one.request)].split("-")[0], []).append(kept.clone())
        return survivors

    monkeypatch.setattr(Compactor, "_choose", noting)
    return found


def test_a_preemption_before_any_step_gives_a_valid_run(
    evicting: tuple[Any, Checker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was generated stays; the same prompt tokens survive; up to the first eviction every token is the same."""
    llm, checker = evicting
    prompt = tokens(random.Random(7), PROMPT)
    kept = kept_of(monkeypatch)
    llm.reset_prefix_cache()
    plain = serve(llm, prompt, "plain")
    chunks = -(-PROMPT // 128)
    for step in range(1, OUTPUT + chunks - 1):
        llm.reset_prefix_cache()
        got = serve(llm, prompt, f"p{step}", preempt_before=step)
        made = max(0, step - chunks + 1)
        assert got[:made] == plain[:made]
        if made == 0:  # the first token is computed before the first eviction
            assert got == plain
        assert all(torch.equal(k, kept["plain"][0]) for k in kept[f"p{step}"])
        assert len(kept[f"p{step}"]) == (2 if 2 <= made < OUTPUT - 1 else 1)
        assert leaked(llm) == 0
    assert checker.worst < CLOSE
    assert checker.compressed > 1000


def test_a_batch_keeps_what_each_request_keeps_alone(
    evicting: tuple[Any, Checker], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, checker = evicting
    rnd = random.Random(8)
    prompts = [tokens(rnd, rnd.choice((40, 97, 130, 200, 333))) for _ in range(64)]
    found = kept_of(monkeypatch)
    llm.reset_prefix_cache()
    together = generate(llm, prompts, 8)
    batch, mixed = sorted(found, key=int), dict(found)
    found.clear()
    some = [i for i, p in enumerate(prompts) if len(p) > 100][:6]
    some += [i for i, p in enumerate(prompts) if len(p) == 40][:2]
    for i in some:
        llm.reset_prefix_cache()
        assert generate(llm, [prompts[i]], 8) == [together[i]]
    alone = [k for name in sorted(found, key=int) for k in found[name]]
    evicted = [n for n, p in enumerate(prompts) if len(p) > 96]
    same = [mixed[batch[evicted.index(i)]][0] for i in some if i in evicted]
    assert len(alone) == len(same) == 6
    assert all(torch.equal(a, b) for a, b in zip(alone, same))
    assert checker.worst < CLOSE


def test_the_order_of_survivors_does_not_matter(evicting: tuple[Any, Checker], monkeypatch: pytest.MonkeyPatch) -> None:
    """Survivors shuffled in every head's slots, keys and values together: attention is the same sum."""
    llm, checker = evicting
    prompt = tokens(random.Random(9), PROMPT)
    plain = serve(llm, prompt, "ordered")
    move, gen = Compactor._move, torch.Generator().manual_seed(0)
    moved = []

    def shuffled(self: Any, blocks: Any, survivors: torch.Tensor, *rest: Any) -> None:
        order = torch.rand(survivors.shape, generator=gen).argsort(-1)
        moved.append(not torch.equal(survivors.gather(-1, order), survivors))
        move(self, blocks, survivors.gather(-1, order), *rest)

    monkeypatch.setattr(Compactor, "_move", shuffled)
    llm.reset_prefix_cache()
    assert serve(llm, prompt, "shuffled") == plain
    assert moved == [True]
    assert checker.worst < CLOSE


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_score_that_is_not_finite_ends_the_step(
    evicting: tuple[Any, Checker], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Raised out of the step, before anything is moved or freed."""
    llm, _ = evicting
    score = SnapKV.score

    def spoiled(self: Any, view: Any) -> torch.Tensor:
        found = score(self, view).clone()
        found[0, 0, 5] = value
        return found

    moved: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(SnapKV, "score", spoiled)
        patch.setattr(Compactor, "_move", lambda *a: moved.append(a))
        with pytest.raises(RuntimeError, match="snapkv: a score is not finite"):
            serve(llm, tokens(random.Random(10), PROMPT), f"bad{value}")
    assert not moved
    llm.llm_engine.abort_request(list(core(llm).scheduler.requests), internal=True)


def test_speculation_is_refused_before_weights_load(tiny_model: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    import vllm_ext
    from vllm_ext.options import ConfigError

    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    args = vllm_ext.engine_args("snapkv") | {"speculative_config": ngram, "skip_tokenizer_init": True}
    with pytest.raises(ConfigError, match="cannot be used with --speculative-config"):
        EngineArgs(model=str(tiny_model), dtype="float32", **args).create_engine_config()
