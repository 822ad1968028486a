"""Options of methods on top of the engine: refusals name the option and the remedy; hosts get the shared options."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_ext import catalogue
from vllm_ext.attention_backends.hosted import HOSTS
from vllm_ext.kernels.page_clusters import MOST
from vllm_ext.options import ConfigError, build

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "epsilon 0": ("vattention", {"epsilon": 0}, r"vattention\.epsilon must be between 0 and 1, both excluded, got 0"),
    "epsilon 1": ("vattention", {"epsilon": 1.0}, r"vattention\.epsilon must be between 0 and 1"),
    "epsilon above 1": ("vattention", {"epsilon": 1.5}, r"vattention\.epsilon must be at most 1, got 1\.5"),
    "delta 1": ("vattention", {"delta": 1}, r"vattention\.delta must be between 0 and 1"),
    "delta below 0": ("vattention", {"delta": -0.1}, r"vattention\.delta must be at least 0"),
    "cap 0": ("vattention", {"cap": 0}, r"vattention\.cap must be above 0"),
    "guarantee": ("vattention", {"guarantee": "both"}, r"vattention\.guarantee must be one of denominator, output"),
    "no host": ("vattention", {"host": "tactic"}, r"vattention\.host must be one of quest, oracle_topk, streaming"),
    "itself": ("resa", {"host": "resa"}, r"resa\.host must be one of quest, oracle_topk, streaming"),
    "lambda": ("resa", {"lambda_": 1.2}, r"resa\.lambda_ must be at most 1"),
    "gate": ("resa", {"gate": 2.0}, r"resa\.gate must be at most 1"),
    "mass 0": ("tactic", {"mass": 0}, r"tactic\.mass must be above 0"),
    "mass above 1": ("tactic", {"mass": 1.1}, r"tactic\.mass must be at most 1"),
    "centroids": ("tactic", {"centroids": "median"}, r"tactic\.centroids must be one of page_mean, kmeans"),
    "one cluster": (
        "tactic",
        {"centroids": "kmeans", "page_size": 16},
        r"tactic\.centroids is kmeans, but pages of 16 hold no two clusters of 16; raise page_size or lower",
    ),
    "iterations": ("tactic", {"iterations": 0}, r"tactic\.iterations must be at least 1"),
    "others": ("lychee", {"others": "none"}, r"lychee\.others must be one of carried, recent"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    name, options, pattern = REFUSED[case]
    with pytest.raises(ConfigError, match=pattern) as caught:
        build(catalogue.get(name).cls(), name, options)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("name", ["vattention", "resa"])
@pytest.mark.parametrize("host", HOSTS)
def test_hosts_get_the_shared_options(name: str, host: str) -> None:
    method = build(catalogue.get(name).cls(), name, {"host": host, "budget": 2048, "sink": 2, "dense_below": 100})
    inner = method.host_method
    assert inner.plugin_name() == host
    assert (inner.budget, inner.sink, inner.dense_limit) == (2048, 2, 100)
    assert method.record_elements(64) == inner.record_elements(64)
    assert method.engine_args()["block_size"] == inner.page_size


def test_clusters_of_a_page() -> None:
    """Average cluster size 16 as in the paper; a row for each cluster and one for their counts."""
    cls = catalogue.get("tactic").cls()
    assert build(cls, "tactic", {}).record_elements(128) == 128
    four = build(cls, "tactic", {"centroids": "kmeans"})
    assert (four.clusters, four.record_elements(128)) == (4, 5 * 128)
    most = build(cls, "tactic", {"centroids": "kmeans", "page_size": 128, "cluster_size": 8})
    assert most.clusters == MOST


def test_smaller_errors_need_more_draws() -> None:
    """The factor z / epsilon; the output's error is split between numerator and denominator."""
    cls = catalogue.get("vattention").cls()
    loose, tight, output = (
        build(cls, "vattention", o).target.factor
        for o in ({"epsilon": 0.1}, {"epsilon": 0.05}, {"epsilon": 0.1, "guarantee": "output"})
    )
    assert loose == pytest.approx(1.959964 / 0.1)
    assert tight == pytest.approx(2 * loose)
    assert output == pytest.approx(4 * 2.241403 / 0.1)
