"""Every attention method in real engines on a GPU with FULL graphs: room for all keys equals stock; sparse steps are
counted.

Graphs without torch.compile: what is captured is the attention, and an engine starts in seconds. Greedy texts are
compared up to ties, as in test_gpu_engine.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_gpu_engine import LENGTHS, OUTPUT, differences, prompts, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]},
}
COVERING = {"budget": 4096, "dense_below": 0}
SPARSE = {"budget": 512, "dense_below": 0}
# Options beside those: (with room for every key, with sparse lists). A further row has a word behind the name.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vattention": ({}, {"epsilon": 0.1}),
    "tactic": ({"mass": 1.0}, {"budget": 2048, "mass": 0.8}),
    "tactic kmeans": ({"mass": 1.0, "centroids": "kmeans"}, {"budget": 2048, "mass": 0.8, "centroids": "kmeans"}),
    "resa": ({}, {}),
    "infllm_v2": ({}, {"local": 2}),
    "retro": ({}, {}),
}
DECODE_KERNELS = (
    "_score_select", "_score_records", "_sparse_decode", "_pilot", "_rest", "_residual_decode", "row_scores",
    "rank_pages", "_probe_pages", "_write_lists", "_gate_step", "_mixed_decode", "_coarse", "_fine_select", "_expand",
    "_page_union",
)  # fmt: skip
names = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def stock(smollm2_dir: str) -> dict[str, Any]:
    return run(smollm2_dir, {}, prompts())


@names
def test_room_for_every_key_is_stock(smollm2_dir: str, stock: dict[str, Any], name: str) -> None:
    found = run(smollm2_dir, {name.split()[0]: COVERING | METHODS[name][0]}, prompts(), **GRAPHS)
    assert "FULL" in found["mode"]
    assert not differences(stock, found, 0)
    assert not differences(stock, found, 1)
    read, visible, _, pages, sparse_steps, dense_steps, *_ = found["stats"]
    assert read == visible > 0
    assert pages > 0
    assert sparse_steps > dense_steps


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the Triton kernels that vLLM saw compiled after an engine's start."""
    from vllm.utils import jit_monitor

    names: list[str] = []
    activate = jit_monitor.activate

    def activated(**options: Any) -> None:
        """The end of an engine's start; the monitor itself stays active over the next engine's start."""
        activate(**options)
        names.clear()

    monkeypatch.setattr(jit_monitor, "_handle_jit_event", lambda *, fn_name, **event: names.append(fn_name))
    monkeypatch.setattr(jit_monitor, "activate", activated)
    return names


@names
def test_sparse_lists_in_graphs(smollm2_dir: str, stock: dict[str, Any], name: str, compiled: list[str]) -> None:
    """Prompts are exact, so first tokens are stock's; short requests are stock's altogether; counters count.

    Requests are prefilled in chunks beside others that decode, and no kernel of a decode step is compiled for it.
    """
    found = run(smollm2_dir, {name.split()[0]: SPARSE | METHODS[name][1]}, prompts(), **GRAPHS)
    first = [[t[0] for t in x["tokens"][0]] for x in (found, stock)]
    assert sum(a == b for a, b in zip(*first)) >= len(LENGTHS) - 1
    short = [i for i, n in enumerate(LENGTHS) if n + OUTPUT <= SPARSE["budget"]]
    assert not [w for w in differences(stock, found, 0) if int(w.split()[1]) in short and not name.startswith("tactic")]
    read, visible, scored, pages, steps, _, select_bytes, _ = found["stats"]
    print(f"{name}: density {read / visible:.3f}, {scored} pages scored, {pages} read, {steps} steps, {select_bytes} B")
    assert 0.05 < read / visible < 0.9
    assert not [x for x in compiled if x in DECODE_KERNELS]
    assert scored > pages > 0


@names
def test_two_rounds_agree(smollm2_dir: str, name: str) -> None:
    """A prefix hit gives the same answer up to ties, except for a prior made from other queries (resa)."""
    if name == "resa":
        pytest.skip("on a prefix hit resa's prior is made from the queries computed now")
    found = run(smollm2_dir, {name.split()[0]: SPARSE | METHODS[name][1]}, prompts())
    assert found["cached"] > 4000
    assert not differences(found, {"tokens": [found["tokens"][1]]}, 0)
