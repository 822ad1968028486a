"""Speculation on a GPU: the host function in the stream, and real engines under model runner V2 with FULL graphs."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from fixed_cache import FIXED_CACHE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TIE = 0.5
"""bfloat16 kernels differ with the query length: texts are compared up to ties of the stock run's log-probabilities."""


@pytest.mark.parametrize("hedge", ["", "request"])
def test_stream_step_equals_the_step_on_the_host(hedge):
    """The same rows, once through the stream with lengths on the GPU, once directly."""
    from vllm_ext.spec_decode.stream import StreamStep
    from vllm_ext.spec_decode.tables import LookupDrafter, LookupSettings

    settings = LookupSettings(
        6, 4, 512, shared=400, arms=("longest", "first", "ngram", "shared"), hedge=hedge, handicap=1
    )
    host, streamed = LookupDrafter(settings), LookupDrafter(settings)
    pinned = torch.zeros(4, 600, dtype=torch.int32, pin_memory=True)
    text, total = pinned.numpy(), torch.zeros(4, dtype=torch.int32, device="cuda")
    stream = StreamStep(streamed, text, total)
    rnd, lengths, names = random.Random(0), [0] * 4, [""] * 4
    drafts = torch.zeros(4, 6, dtype=torch.int64, device="cuda")
    matched = torch.zeros(4, dtype=torch.int32, device="cuda")
    for step in range(150):
        for row in range(4):
            if not names[row] or rnd.random() < 0.03:
                for drafter in (host, streamed):
                    drafter.remove(names[row])
                names[row], lengths[row] = f"{row}-{step}", rnd.randrange(3, 40)
                text[row, : lengths[row]] = [rnd.randrange(4) for _ in range(lengths[row])]
                tenant = str(rnd.randrange(2))
                for drafter in (host, streamed):
                    drafter.add(names[row], text[row, : lengths[row]], lengths[row], tenant)
            new = rnd.randrange(1, 4)
            text[row, lengths[row] : lengths[row] + new] = [rnd.randrange(4) for _ in range(new)]
            lengths[row] = min(lengths[row] + new, 590)
        total.copy_(torch.tensor(lengths, dtype=torch.int32))
        sampled = torch.tensor([rnd.randrange(2) for _ in range(4)], dtype=torch.int32)
        want, hits = np.zeros((8, 6), np.int64), np.zeros(8, np.int32)
        seen = [n if s else 0 for n, s in zip(lengths, sampled.tolist())]
        table = host.rows(names, range(4), seen, [0] * 4)
        host.step(table, text, want[: len(table)], hits[: len(table)])
        stream.run(streamed.rows(names, range(4), 0, [0] * 4), 4, sampled.cuda(), drafts, matched)
        assert matched.tolist() == hits[:4].tolist()
        assert drafts.tolist() == want[:4].tolist()


def prompts(tokenizer: Any) -> list[list[int]]:
    """Real prompts of every load of the benchmark, lengths from 40 to 1000."""
    from vllm_ext.bench.spec_loads import prompts

    return [p for load in ("edit", "summary", "chat", "agent") for p in prompts(load, tokenizer, 3, 7)]


def run(model: str, plugins: dict[str, dict[str, Any]], temperature: float = 0.0, **extra: Any) -> dict[str, Any]:
    """Answers of one engine with what it really was."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    import vllm_ext
    from vllm_ext.evaluation.engine import engine

    arguments = {
        "max_model_len": 2048, "max_num_seqs": 8, "max_num_batched_tokens": 512,
        **FIXED_CACHE,
        "enforce_eager": True, "disable_log_stats": False, "seed": 0,
    } | (vllm_ext.engine_args(*plugins, **plugins) if plugins else {}) | extra  # fmt: skip
    ids = [{"prompt_token_ids": p} for p in prompts(AutoTokenizer.from_pretrained(model))]
    params = SamplingParams(temperature=temperature, max_tokens=64, ignore_eos=True, logprobs=5, seed=1)
    with engine(model, arguments) as llm:
        out = llm.generate(ids, params, use_tqdm=False)
        config = llm.llm_engine.vllm_config
        found = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
        return {
            "tokens": [list(o.outputs[0].token_ids) for o in out],
            "logprobs": [o.outputs[0].logprobs for o in out],
            "v2": config.use_v2_model_runner,
            "async": config.scheduler_config.async_scheduling,
            "graphs": str(config.compilation_config.cudagraph_mode),
            "drafted": found.get("vllm:spec_decode_num_draft_tokens", 0),
            "accepted": found.get("vllm:spec_decode_num_accepted_tokens", 0),
        }


def differences(stock: dict[str, Any], other: dict[str, Any]) -> list[int]:
    """Requests whose first differing token is no tie in the stock run."""
    wrong = []
    for r, (a, b) in enumerate(zip(stock["tokens"], other["tokens"])):
        at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if at is None:
            continue
        held = stock["logprobs"][r][at]
        if b[at] not in held or held[a[at]].logprob - held[b[at]].logprob > TIE:
            wrong.append(r)
    return wrong


@pytest.fixture(scope="module")
def stock(smollm2_dir):
    """No speculation."""
    return run(smollm2_dir, {})


@pytest.mark.parametrize(
    "plugins",
    [
        {"suffix_automaton": {"num_speculative_tokens": 6}},
        {"suffix_automaton": {"num_speculative_tokens": 6, "shared": 20000}},
        {"draft_model": {"num_speculative_tokens": 3}},
        {"hybrid": {"num_speculative_tokens": 3, "sampling": "probabilistic"}},
    ],
    ids=["suffix_automaton", "shared", "draft_model", "hybrid"],
)
def test_greedy_answers_are_those_without_speculation(smollm2_dir, stock, plugins):
    """Eager; the model drafts for itself where a draft model is needed, so its drafts are nearly all accepted."""
    for options in plugins.values():
        options |= {"model": smollm2_dir} if plugins.keys() & {"draft_model", "hybrid"} else {}
    found = run(smollm2_dir, plugins)
    assert found["v2"]
    assert found["async"]
    assert found["accepted"] > 0.1 * found["drafted"]
    if "draft_model" in plugins:
        assert found["accepted"] > 0.9 * found["drafted"]
    assert differences(stock, found) == []


def test_full_graphs_and_asynchronous_scheduling_stay(smollm2_dir, stock):
    """The suffix automaton with graphs: same answers, FULL graphs for decode steps, nothing synchronous."""
    found = run(smollm2_dir, {"suffix_automaton": {"num_speculative_tokens": 4}}, enforce_eager=False)
    assert (found["v2"], found["async"]) == (True, True)
    assert "FULL" in found["graphs"]
    assert found["accepted"] > 0
    assert differences(stock, found) == []
