"""Methods with trained files, seer and lychee: refusals before weights load, tokens and counters of real engines."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    COVERING,
    PAGE,
    complete_pages,
    counters,
    generate,
    groups,
    leaked,
    sparse_layers,
    start,
    tokens,
)
from learned import ROPE, gates, random_gates, roles
from test_limits import LLAMA, directory

from vllm_ext.attention_backends import gate_file, role_file
from vllm_ext.attention_backends.rope import ModelShape, model_shape
from vllm_ext.options import ConfigError

SHAPE = ModelShape(3, 4, 2, 32, ROPE)
"""Of the tiny model."""
FILES = {"seer": {"gates": gates(3, 2, 2, 32, 32, PAGE)}, "lychee": {"roles": roles(3, 2, 2, 32)}}


def build(path: Path, plugin: str, options: dict[str, Any], model: str = "llama") -> Any:
    """The VllmConfig as `vllm serve` makes it before it loads weights."""
    from vllm.engine.arg_utils import EngineArgs

    import vllm_ext

    ours = vllm_ext.engine_args(plugin, **{plugin: {"page_size": PAGE} | options})
    return EngineArgs(**{"model": directory(path, model), "skip_tokenizer_init": True} | ours).create_engine_config()


def test_shape_of_a_configuration(tmp_path: Path) -> None:
    from transformers import AutoConfig

    found = model_shape(AutoConfig.from_pretrained(directory(tmp_path, "llama")))
    assert found == ModelShape(4, 4, 2, 32, ROPE)


REFUSED = {
    "no shipped gates": ("seer", {}, "no gates ship .*4 layers, 2 KV heads.*vllm-ext train seer"),
    "no gate file": ("seer", {"gates": "/nowhere/g.safetensors"}, "seer.gates /nowhere/g.safetensors cannot be read"),
    "gates of another model": (
        "seer",
        {"gates": gates(3, 2, 2, 32, 32, PAGE)},
        "another model .3 layers.* this one has 4",
    ),
    "gates of other pages": ("seer", {"gates": gates(4, 2, 2, 32, 32, 64)}, "pages of 64 .* set seer.page_size to 64"),
    "threshold": (
        "seer",
        {"gates": gates(4, 2, 2, 32, 32, PAGE), "threshold": 1.5},
        "seer.threshold must be at most 1",
    ),
    "no shipped roles": ("lychee", {}, "no head roles ship .*4 layers.*vllm-ext train lychee"),
    "no role file": ("lychee", {"roles": "/nowhere/r.json"}, "lychee.roles /nowhere/r.json is no role file"),
    "shape of roles": ("lychee", {"roles": roles(3, 2, 2, 32)}, r"shape .*\(3, 2\).* needs \[4, 2\]"),
    "roles of another model": ("lychee", {"roles": roles(4, 2, 4, 32)}, "another model .*group 4.* this one has"),
    "too many heads": ("lychee", {"roles": roles(4, 2, 2, 32), "retrieval_heads": 7}, "retrieval_heads is 7.* has 6"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    plugin, options, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words) as found:
        build(tmp_path, plugin, options)
    assert str(found.value).count("\n") == 0


def published(path: Path, layers: list[dict[str, torch.Tensor]]) -> str:
    """Gates as published: no header of ours."""
    from safetensors.torch import save_file

    name = "model.layers.{}.self_attn.attn_gate.{}.weight"
    save_file({name.format(i, gate_file.PARTS[k]): v for i, g in enumerate(layers) for k, v in g.items()}, path)
    return str(path)


def test_published_gates_load(tmp_path: Path) -> None:
    shape = ModelShape(4, 4, 2, 32, ROPE)
    made = random_gates(shape, 64)
    file = gate_file.read(published(tmp_path / "g.safetensors", made))
    assert file.width == 64
    file.check(shape, 64, [0, 1, 2, 3])
    half = file.load(2, 1, 1)  # the second of two ranks
    assert torch.equal(half["q"][0], made[2]["q"][1].flatten(0, 1))
    assert torch.equal(half["k"][0], made[2]["k"][1])
    build(tmp_path, "seer", {"gates": str(tmp_path / "g.safetensors")})


def test_published_gates_of_another_shape_are_refused(tmp_path: Path) -> None:
    wider = published(tmp_path / "g.safetensors", random_gates(ModelShape(4, 8, 2, 32, ROPE), 32))
    with pytest.raises(ConfigError, match=r"has shape \[2, 4, 32, 32\], this model needs \[2, 2, 32, 32\]"):
        build(tmp_path, "seer", {"gates": wider})
    shorter = published(tmp_path / "h.safetensors", random_gates(ModelShape(3, 4, 2, 32, ROPE), 32))
    shutil.rmtree(tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"layers.3.*attngate_linear_q.weight is missing, this model needs"):
        build(tmp_path, "seer", {"gates": shorter})


def test_positions_that_are_no_plain_rotation_are_refused(tmp_path: Path) -> None:
    out = Path(directory(tmp_path, "llama"))
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
    (out / "config.json").write_text(json.dumps({**LLAMA, "rope_parameters": yarn}))
    from vllm.engine.arg_utils import EngineArgs

    import vllm_ext

    ours = vllm_ext.engine_args("seer", seer={"page_size": PAGE})
    with pytest.raises(ConfigError, match=r"undo the rotary embedding .*'yarn'.* default, linear, llama3"):
        EngineArgs(model=str(out), skip_tokenizer_init=True, **ours).create_engine_config()


def test_other_number_of_retrieval_heads() -> None:
    file = role_file.read(FILES["lychee"]["roles"])
    assert [sum(row) for row in file.best(0)] == [2, 0, 0]
    assert sum(map(sum, file.best(3))) == 2 + 3
    ranked = file.best(1)
    assert ranked[1] == (False, True)  # the trained retrieval head comes first
    assert file.retrieval[1] == (False, True)


# ------------------------------------------------------------------------------------------------------ engines
def prompts() -> list[list[int]]:
    """Chunks, page ends, a shared beginning; 12 requests that do not fit a pool of 60 pages together."""
    rnd = random.Random(3)
    shared = tokens(rnd, 200)
    made = [tokens(rnd, n) for n in (1, 31, 32, 33, 64, 300, 511, 640)]
    return made + [shared + tokens(rnd, n) for n in (5, 56, 120, 300)]


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> list[list[int]]:
    with start(tiny_model) as llm:
        return generate(llm, prompts(), 40)


def wrong_gate_records(llm: Any) -> tuple[int, int]:
    """Gate keys that differ from those rebuilt from the page, over all layers; and how many were compared."""
    from vllm_ext.attention_backends.cpu_backend import cache_views
    from vllm_ext.attention_backends.support import index_view
    from vllm_ext.kernels import reference_gate

    [group] = groups(llm)
    stages = group.get_metadata_builder(0).stages
    wrong = compared = 0
    for name, layer in sparse_layers(llm).items():
        keys, _ = cache_views(layer.kv_cache)
        index = index_view(layer.kv_cache, layer.impl.method, layer.impl.head_size)
        g = stages.gates[int(name.split(".layers.")[1].split(".")[0])]
        for page in complete_pages(llm):
            found = index[page].flatten(1)[:, : stages.width]
            # the page's place in its request is not known here: one of the first places must fit
            made = (
                reference_gate.page_record(keys[page], i * PAGE, g["k"], g["k_norm"], stages.inv_freq, stages.gate_freq)
                for i in range(24)
            )
            wrong += not any(torch.allclose(found.float(), m, atol=1e-3) for m in made)
            compared += 1
    return wrong, compared


@pytest.mark.engine
@pytest.mark.parametrize("name", ["seer", "lychee", "lychee recent"])
def test_room_for_every_page_is_stock(tiny_model: Path, stock: list[list[int]], name: str) -> None:
    """Chunked prefill, mixed batches, prefix hits, preemption: the same tokens."""
    plugin, _, others = name.partition(" ")
    options = COVERING | {"dense_layers": []} | FILES[plugin] | ({"others": others} if others else {})
    with start(tiny_model, {plugin: options}, num_gpu_blocks_override=60) as llm:
        assert generate(llm, prompts(), 40) == stock
        assert generate(llm, prompts()[::-1], 40) == stock[::-1]
        stats = counters(llm)
        assert leaked(llm) == 0
        if name == "seer":
            wrong, compared = wrong_gate_records(llm)
            assert wrong == 0
            assert compared > 50
    assert stats["keys_read"] == stats["keys_visible"] > 0
    # a preempted request computes its next token in a prefill again
    assert 0.8 < stats["sparse_steps"] / (2 * len(stock) * 39) <= 1
