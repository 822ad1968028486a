"""Models with sliding-window layers: those stay stock, the full-attention layers run sparse."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from engines import COVERING, SPARSE, counters, generate, layers, leaked, sparse_layers, start, tokens

from vllm_ext.options import ConfigError

pytestmark = pytest.mark.engine

LENGTHS = (1, 31, 32, 33, 64, 100, 300, 900)


def model(path: Path, kinds: str) -> Path:
    """A random Mistral whose layers are of full (f) or sliding-window (s) attention."""
    from vllm_ext.models import tiny_llama

    out = tiny_llama(
        path / kinds, layers=len(kinds), head_dim=32, hidden=64, intermediate=64, vocab=256, sliding_window=64
    )
    config = json.loads((out / "config.json").read_text())
    config["layer_types"] = [{"f": "full_attention", "s": "sliding_attention"}[k] for k in kinds]
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rnd = random.Random(0)
    return [tokens(rnd, n) for n in LENGTHS]


# 'fsfsff': four full and two windowed layers make three KV-cache groups, two of them with sparse layers
@pytest.mark.parametrize("kinds", ["fssf", "fsfsff"])
def test_windowed_layers_stay_stock(tmp_path, prompts, kinds: str) -> None:
    path = model(tmp_path, kinds)
    with start(path, max_model_len=1024) as llm:
        want = generate(llm, prompts, 24)
    with start(path, {"quest": COVERING}) as llm:
        assert generate(llm, prompts, 24) == want
        assert generate(llm, prompts, 24) == want
        names = list(layers(llm))
        assert list(sparse_layers(llm)) == [names[i] for i, k in enumerate(kinds) if k == "f" and i != 1]
        stats = counters(llm)
        assert stats["keys_read"] == stats["keys_visible"] > 0
        assert leaked(llm) == 0
        exported = totals(llm)
    # all groups together; without the last step, which is published by the next one
    steps = 2 * len(LENGTHS) * 23
    assert steps - len(LENGTHS) <= exported["sparse_steps"] < steps
    assert 0.95 * stats["keys_read"] < exported["keys_read"] == exported["keys_visible"] < stats["keys_read"]


def totals(llm: Any) -> dict[str, int]:
    """What the server's collector would report; a step behind."""
    from vllm_ext.metrics import read_totals

    return read_totals(llm.llm_engine.vllm_config.instance_id)


def test_sparse_budget(tmp_path, prompts) -> None:
    with start(model(tmp_path, "fssf"), {"quest": SPARSE}) as llm:
        first = generate(llm, prompts, 24)
        assert generate(llm, prompts, 24) == first
        stats = counters(llm)
    assert 0.2 < stats["keys_read"] / stats["keys_visible"] < 0.6


@pytest.mark.parametrize("kinds", ["ss", "config"])
def test_model_without_full_attention_is_refused(tmp_path, kinds: str) -> None:
    from vllm_ext.models import tiny_llama

    path = model(tmp_path, "ss") if kinds == "ss" else tiny_llama(tmp_path / "m", layers=2, sliding_window=64)
    sentence = r"^--plugins quest: every layer of .* has a sliding window; drop the plugin\.$"
    with pytest.raises(ConfigError, match=sentence), start(path, {"quest": COVERING | {"dense_layers": []}}):
        pass
