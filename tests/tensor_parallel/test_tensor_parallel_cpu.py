"""Two ranks give the tokens of one: worker processes with half of the heads, experts or expert weights each."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from learned import gates, roles

pytestmark = [pytest.mark.engine, pytest.mark.apart]

COUNT = 10
LAYERS, HEADS, KV_HEADS, HEAD = 3, 8, 4, 32
SPARSE: dict[str, Any] = {"page_size": 32, "budget": 96, "sink": 1, "local": 1, "dense_below": 0, "dense_layers": [0]}


def prompts(lengths: tuple[int, ...] = (40, 100, 300), seed: int = 0) -> list[list[int]]:
    """Random prompts; the longest takes three chunks."""
    rnd = random.Random(seed)
    return [[rnd.randrange(3, 250) for _ in range(n)] for n in lengths]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vllm_ext.models import tiny_llama

    folder = tmp_path_factory.mktemp("ranks") / "dense"
    return tiny_llama(
        folder, layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD, hidden=64, intermediate=128, vocab=256
    )


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vllm_ext.moe.models import tiny_moe

    return tiny_moe(tmp_path_factory.mktemp("ranks") / "moe", "qwen3_moe", vocab=256, hidden=64, head_dim=32)


@pytest.fixture(scope="module")
def alone(ranks: Any, dense: Path) -> list[list[int]]:
    """What one rank of stock vLLM answers."""
    return ranks.run(dense, 1, prompts=prompts(), count=COUNT)["tokens"]


def learned(name: str) -> dict[str, Any]:
    """The option with the file that a method has learned."""
    if name == "seer":
        return {"gates": gates(LAYERS, KV_HEADS, HEADS // KV_HEADS, HEAD, 16, 32)}
    return {"roles": roles(LAYERS, KV_HEADS, HEADS // KV_HEADS, HEAD)} if name == "lychee" else {}


def test_stock_gives_the_same_tokens(ranks: Any, dense: Path, alone: list[list[int]]) -> None:
    """The control: whatever differs below is ours."""
    assert ranks.run(dense, 2, prompts=prompts(), count=COUNT)["tokens"] == alone


@pytest.mark.parametrize("name", ["quest", "seer", "lychee"])
def test_a_sparse_method_reads_the_same_pages(name: str, ranks: Any, dense: Path, alone: list[list[int]]) -> None:
    """Every rank chooses for its own KV heads; together they read, score and count what one rank does."""
    plugins = {name: SPARSE | learned(name)}
    one, two = (ranks.run(dense, n, plugins, prompts=prompts(), count=COUNT) for n in (1, 2))
    assert two["tokens"] == one["tokens"]
    assert one["tokens"] != alone  # pages were left out
    assert two["attention"] == one["attention"]
    assert 0 < one["attention"]["keys_read"] < one["attention"]["keys_visible"]


def test_an_eviction_keeps_the_same_tokens(ranks: Any, dense: Path, alone: list[list[int]]) -> None:
    plugins = {"snapkv": {"budget": 64, "window": 16, "block_size": 32}}
    one, two = (ranks.run(dense, n, plugins, prompts=prompts(), count=COUNT) for n in (1, 2))
    assert two["tokens"] == one["tokens"] != alone
    assert two["kv"]["kv_compactions"] > 0


def test_drafts_are_the_same_on_every_rank(ranks: Any, dense: Path) -> None:
    """Speculation is exact; ranks that drafted differently would part here."""
    texts = [p * 3 for p in prompts((9, 20, 30))]
    stock = ranks.run(dense, 1, prompts=texts, count=30)["tokens"]
    two = ranks.run(dense, 2, {"suffix_automaton": {"num_speculative_tokens": 3}}, prompts=texts, count=30)
    assert two["tokens"] == stock
    assert two["stats"]["vllm:spec_decode_num_accepted_tokens"] > 0


def traced(path: Path) -> tuple[list[int], list[np.ndarray]]:
    """Prompt lengths and the sorted ids of each request, in the order of the prompts' lengths."""
    from vllm_ext.moe import trace_file

    trace = trace_file.load(path)
    order = np.argsort(trace.prompt)
    return trace.prompt[order].tolist(), [np.sort(trace.requests[i]) for i in order]


@pytest.mark.parametrize(
    ("how", "plugins", "weights"),
    [
        ({"spawn": True}, {"kern": {"gamma": 2.0}}, [8, 64, 64]),
        ({}, {"dirmoe": {"threshold": 0.5}, "sonic_moe": {}}, [8, 64, 64]),
        ({"enable_expert_parallel": True}, {"dirmoe": {"threshold": 0.5}, "sonic_moe": {}}, [4, 128, 64]),
    ],
    ids=["kern-new-processes", "sonic_moe", "sonic_moe-expert-parallel"],
)
def test_routers_kernels_and_traces(
    how: dict[str, Any], plugins: dict[str, Any], weights: list[int], ranks: Any, moe: Path, tmp_path: Path
) -> None:
    """Tokens, and one file with the trace of one rank; the plugins are in place in both worker processes."""
    files = [tmp_path / f"trace-{n}.safetensors" for n in (1, 2)]
    one, two = (
        ranks.run(moe, n, plugins | {"moe_trace": {"path": str(f)}}, prompts=prompts(), count=COUNT, **more)
        for n, f, more in zip((1, 2), files, ({}, how))
    )
    assert two["tokens"] == one["tokens"]
    assert len({r["process"] for r in two["ranks"]}) == 2
    assert all(r["routers"] == ["Router", "Router"] for r in two["ranks"])
    assert all(r["weights"] == [weights, weights] for r in two["ranks"])
    assert sorted(tmp_path.iterdir()) == files
    (lengths, a), (same, b) = map(traced, files)
    assert lengths == same == [40, 100, 300]
    assert all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("plugins", [{"quest": SPARSE}, {"snapkv": {"block_size": 32}}], ids=["quest", "snapkv"])
def test_more_ranks_than_kv_heads_are_refused(plugins: dict[str, Any], dense: Path) -> None:
    assert_refused(dense, plugins, "--tensor-parallel-size of at most 4", tensor_parallel_size=8)


@pytest.mark.parametrize(
    ("plugins", "word"),
    [
        ({"snapkv": {"block_size": 32, "scope": "layer"}}, "snapkv.scope layer"),
        ({"rest_kv": {"block_size": 32}}, "--tensor-parallel-size 1"),
    ],
)
def test_scores_over_the_heads_of_all_ranks_are_refused(plugins: dict[str, Any], word: str, dense: Path) -> None:
    assert_refused(dense, plugins, word, tensor_parallel_size=2)


def test_vllms_own_experts_on_cpus_are_refused_under_expert_parallelism(moe: Path) -> None:
    """They do not look at the map of experts, and crash."""
    more = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    assert_refused(moe, {"kern": {}}, "add sonic_moe", **more)
    config(moe, {"kern": {}, "sonic_moe": {}}, **more)


def config(model: Path, plugins: dict[str, Any], **extra: Any) -> Any:
    """The configuration of an engine, without one."""
    from rank_engines import BASE
    from vllm import EngineArgs

    import vllm_ext

    return EngineArgs(str(model), **BASE | vllm_ext.engine_args(*plugins, **plugins) | extra).create_engine_config()


def assert_refused(model: Path, plugins: dict[str, Any], word: str, **extra: Any) -> None:
    """One sentence that holds `word`, before any worker is started."""
    from vllm_ext.options import ConfigError

    with pytest.raises(ConfigError) as caught:
        config(model, plugins, **extra)
    assert word in str(caught.value)
