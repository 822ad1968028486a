"""Free generation and its judge, and what decode steps are counted to read."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vllm_ext.evaluation.rows import check_prefill, parse_rows
from vllm_ext.options import ConfigError

PROMPTS = (300, 170, 33, 421)
OUTPUT = 24
ROWS = {
    "quest": {"budget": 128, "page_size": 32, "dense_below": 0, "dense_layers": [0, 1]},
    "snapkv": {"budget": 64, "block_size": 32},
}


@pytest.mark.engine
@pytest.mark.parametrize("plugin", ROWS)
def test_judge_is_full_attention(plugin, tiny_model, in_process):
    """Under plugins, with chunked prompts and a warm prefix cache, the judge equals transformers; decode does not."""
    import torch
    from transformers import AutoModelForCausalLM

    import vllm_ext
    from vllm_ext.evaluation.engine import engine
    from vllm_ext.evaluation.generation import draw, prompt_logprobs
    from vllm_ext.evaluation.reads import Meter

    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in PROMPTS]
    arguments = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 128, "seed": 3}
    arguments |= {"enforce_eager": True, "skip_tokenizer_init": True}
    with engine(tiny_model, arguments | vllm_ext.engine_args(plugin, **{plugin: ROWS[plugin]})) as llm:
        meter = Meter(llm)
        drawn = draw(llm, prompts, OUTPUT)
        read = meter.cell()
        judged = prompt_logprobs(llm, [p + d for p, (d, _) in zip(prompts, drawn)])
        repeated = prompt_logprobs(llm, [p + d for p, (d, _) in zip(prompts, drawn)])
    net = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for prompt, (tokens, own), found, again in zip(prompts, drawn, judged, repeated, strict=True):
        ids = torch.tensor(prompt + tokens)
        with torch.no_grad():
            want = net(ids[None]).logits[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy()
        np.testing.assert_allclose(found[1:], want, atol=1e-3)
        np.testing.assert_allclose(again, found, atol=1e-5)
        # The first token is the prefill's; those behind short prompts read every key.
        exact = len(tokens) if len(prompt) + len(tokens) <= 64 else 1
        np.testing.assert_allclose(own[:exact], want[-OUTPUT:][:exact], atol=1e-3)
        assert exact > 1 or np.abs(own[1:] - want[-OUTPUT:][1:]).max() > 0.01
    if plugin == "quest":
        _check_reads(read["read"])
    else:
        assert read == {}


def _check_reads(read):
    """One sparse layer of three with 2 KV heads of 32, by hand."""
    keys = visible = scored = 0
    for n in (prompt + t for prompt in PROMPTS for t in range(1, OUTPUT)):
        pages = -(-n // 32)
        keys += min(pages, 4) * 32 - (pages * 32 - n)
        visible, scored = visible + n, scored + pages
    key, record = 2 * 32 * 4, 2 * 32 * 4  # bytes of a key and its value, of a page's minimum and maximum
    ours, dense = keys * key + scored * record, visible * key
    assert read["keys_read"] == 2 * keys
    assert read["sparse_steps"] == len(PROMPTS) * (OUTPUT - 1)
    assert read["density"] == pytest.approx(keys / visible)
    assert read["bytes_sparse_layers"] == pytest.approx(ours / dense)
    assert read["bytes"] == pytest.approx((ours + 2 * dense) / (3 * dense))


def test_distinct():
    from vllm_ext.evaluation.generation import distinct

    assert distinct([1, 2, 3, 4, 5, 6]) == 1.0
    assert distinct([7] * 11) == 1 / 8
    assert distinct([1, 2] * 4) == 2 / 5


@pytest.mark.parametrize(
    ("row", "reason"),
    [("streaming_llm:budget=256", "evicts inside prompts"), ("kern", "changes the routing of prompts")],
)
def test_rows_without_a_dense_prefill_are_refused(row, reason):
    with pytest.raises(ConfigError, match=reason):
        check_prefill(parse_rows(["quest", row]))


def test_rows_with_a_dense_prefill_are_taken():
    check_prefill(parse_rows(["quest", "vattention", "snapkv", "r_kv", "moe_trace", "cactus"]))
