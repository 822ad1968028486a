"""Real engines on a GPU: SmolLM2 in bfloat16, stock against plugins, eager and with FULL graphs.

bfloat16 kernels differ in the last bit, so greedy texts are compared up to ties: where two runs first disagree, the
stock run must have held both tokens within `TIE` of each other in log-probability.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from fixed_cache import FIXED_CACHE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TIE = 0.5
LENGTHS = (5, 63, 64, 65, 700, 1500, 2100, 3000)
OUTPUT = 48
COVERING = {"budget": 4096, "dense_below": 0}  # a list that holds every page: must equal dense
SPARSE = {"budget": 512, "dense_below": 0}


def prompts(seed: int = 0) -> list[str]:
    """Real prose, at least LENGTHS tokens each."""
    from vllm_ext.evaluation import corpus

    words = corpus.load().split()
    rnd = random.Random(seed)
    return [" ".join(words[(at := rnd.randrange(0, 9000)) : at + n]) for n in LENGTHS]


def run(model: str, plugin: dict[str, dict[str, Any]], texts: list[str], **extra: Any) -> dict[str, Any]:
    """Greedy outputs of one engine: token ids, log-probabilities, graph modes, counters."""
    from vllm import SamplingParams

    import vllm_ext
    from vllm_ext.evaluation.engine import engine

    args = {
        "max_model_len": 4096, "max_num_seqs": 16, "max_num_batched_tokens": 1024,
        **FIXED_CACHE,
        "enforce_eager": True, "disable_log_stats": False, "cudagraph_metrics": True, "seed": 0,
    } | (vllm_ext.engine_args(*plugin, **plugin) if plugin else {"block_size": 64}) | extra  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True, logprobs=5)
    with engine(model, args) as llm:
        tok = llm.get_tokenizer()
        ids = [{"prompt_token_ids": tok.encode(t)[:n]} for t, n in zip(texts, LENGTHS)]
        results = []
        for batch in (ids, ids[::-1]):  # the second round hits the prefix cache, in another order
            out = llm.generate(batch, params, use_tqdm=False)
            results.append(out if batch is ids else out[::-1])
        config = llm.llm_engine.vllm_config
        stats = _stats(llm) if plugin else None
        return {
            "tokens": [[list(o.outputs[0].token_ids) for o in out] for out in results],
            "logprobs": [[o.outputs[0].logprobs for o in out] for out in results],
            "cached": sum(o.num_cached_tokens or 0 for o in results[1]),
            "mode": str(config.compilation_config.cudagraph_mode),
            "runner": type(
                llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
            ).__module__,
            "stats": stats,
        }


def _stats(llm: Any) -> list[int]:
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    torch.accelerator.synchronize()
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    assert get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention)
    [group] = [g for groups in runner.attn_groups for g in groups]
    return group.get_metadata_builder(0).stages.stats.tolist()


def differences(stock: dict[str, Any], other: dict[str, Any], round_: int) -> list[str]:
    """Requests whose first differing token is no tie in the stock run."""
    wrong = []
    for r, (a, b) in enumerate(zip(stock["tokens"][round_], other["tokens"][round_])):
        at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if at is None:
            continue
        seen = stock["logprobs"][round_][r][at]
        if b[at] not in seen or seen[a[at]].logprob - seen[b[at]].logprob > TIE:
            wrong.append(f"request {r} ({LENGTHS[r]} tokens) at {at}: {a[at]} became {b[at]}, {seen}")
    return wrong


@pytest.fixture(scope="module")
def stock(smollm2_dir: str) -> dict[str, Any]:
    return run(smollm2_dir, {}, prompts())


@pytest.fixture(scope="module")
def covering(smollm2_dir: str) -> dict[str, Any]:
    return run(smollm2_dir, {"quest": COVERING}, prompts())


@pytest.fixture(scope="module")
def sparse(smollm2_dir: str) -> dict[str, Any]:
    return run(smollm2_dir, {"quest": SPARSE}, prompts())


def test_runs_under_the_new_runner(covering: dict[str, Any]) -> None:
    assert covering["runner"].startswith("vllm.v1.worker.gpu.model_runner")


@pytest.mark.parametrize("round_", [0, 1])
def test_covering_budget_is_dense(stock: dict[str, Any], covering: dict[str, Any], round_: int) -> None:
    assert not differences(stock, covering, round_)
    assert covering["cached"] > 4000  # the second round did hit the prefix cache
    read, visible, _, pages, sparse_steps, *_ = covering["stats"]
    assert read == visible > 0
    assert pages > 0
    assert sparse_steps > 0


def test_prefix_hits_give_the_same_tokens(sparse: dict[str, Any]) -> None:
    assert sparse["cached"] > 4000
    again = {"tokens": [sparse["tokens"][1]]}
    assert not differences(sparse, again, 0)


def test_short_requests_equal_stock_when_sparse(stock: dict[str, Any], sparse: dict[str, Any]) -> None:
    short = [i for i, n in enumerate(LENGTHS) if n + OUTPUT <= SPARSE["budget"]]
    wrong = [w for w in differences(stock, sparse, 0) if int(w.split()[1]) in short]
    assert not wrong
    read, visible, *_ = sparse["stats"]
    assert 0.25 < read / visible < 0.35  # 4 x 512 of 7300 keys, and the short requests whole


def test_full_graphs_equal_eager(smollm2_dir: str, sparse: dict[str, Any]) -> None:
    """Captured once, replayed for changing lengths and batch sizes, with torch.compile and async scheduling."""
    graphs = run(smollm2_dir, {"quest": SPARSE}, prompts(), enforce_eager=False)
    assert "FULL" in graphs["mode"]
    assert not differences(sparse, graphs, 0)
    assert graphs["stats"][4] > 0
    assert abs(graphs["stats"][0] / sparse["stats"][0] - 1) < 0.01


@pytest.mark.parametrize("dense_below", [0, 4096])
def test_small_pool_with_preemption(smollm2_dir: str, stock: dict[str, Any], dense_below: int) -> None:
    """A pool of 70 pages holds about half of the batch: requests are preempted and recomputed."""
    plugin = {"quest": {"budget": 4096, "dense_below": dense_below}}
    result = run(smollm2_dir, plugin, prompts(), num_gpu_blocks_override=70)
    assert not differences(stock, result, 0)


@pytest.mark.parametrize("name", ["oracle_topk", "streaming"])
def test_other_methods_run(smollm2_dir: str, stock: dict[str, Any], name: str) -> None:
    covering_run = run(smollm2_dir, {name: COVERING}, prompts())
    assert not differences(stock, covering_run, 0)


def test_v1_runner(smollm2_dir: str, stock: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    result = run(smollm2_dir, {"quest": COVERING}, prompts())
    assert result["runner"].endswith("gpu_model_runner")
    assert not differences(stock, result, 0)


def test_counters_reach_the_exporter(smollm2_dir: str) -> None:
    """The file that the /metrics collector reads holds the device counters, at most a step behind."""
    from vllm import SamplingParams

    import vllm_ext
    from vllm_ext.evaluation.engine import engine
    from vllm_ext.metrics import read_totals

    args = vllm_ext.engine_args("quest", quest=SPARSE) | FIXED_CACHE | {"max_model_len": 2048, "enforce_eager": True}
    with engine(smollm2_dir, args) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
        llm.generate([{"prompt_token_ids": list(range(100, 1100))}], params, use_tqdm=False)
        totals = read_totals(llm.llm_engine.vllm_config.instance_id)
    assert 28 <= totals["sparse_steps"] <= 31
    assert 0.4 < totals["keys_read"] / totals["keys_visible"] < 0.6
