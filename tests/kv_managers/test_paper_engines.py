"""DefensiveKV, Layer-DefensiveKV, ReST-KV, ProtoKV, ThinKV and TRIM-KV in real engines on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.engine

BASE = {
    "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 4, "max_num_batched_tokens": 256, "seed": 0,
    "enforce_eager": True, "skip_tokenizer_init": True, "block_size": 32, "num_gpu_blocks_override": 120,
}  # fmt: skip
TOKENS = 40


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of 4 layers, gates and a layer profile for it."""
    from transformers import AutoConfig

    from vllm_ext.kv_managers.fingerprint import fingerprint
    from vllm_ext.kv_managers.layer_profile import LayerProfile
    from vllm_ext.kv_managers.think_thresholds import Thoughts
    from vllm_ext.models import tiny_llama
    from vllm_ext.training.gated import Gates

    folder = tmp_path_factory.mktemp("kv")
    model = tiny_llama(folder / "tiny", layers=4, head_dim=32, hidden=64, intermediate=128, vocab=256)
    config = AutoConfig.from_pretrained(model)
    gates = Gates.of(config, inner=16, bias=5.0, seed=0)
    with torch.no_grad():
        gates.w2.mul_(50)  # spread the retentions
    gates.export(config, 64).save(folder / "gates.safetensors")
    Thoughts((1, 2), 0.2, 0.4, fingerprint(config), {}).save(folder / "thoughts.json")
    LayerProfile((0.5, 1.5, 1.5, 0.5), fingerprint(config), {}).save(folder / "layers.json")
    names = {"gates": "gates.safetensors", "profile": "layers.json", "thoughts": "thoughts.json"}
    return {"model": model, **{k: folder / name for k, name in names.items()}}


def prompts() -> list[list[int]]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, (n,), generator=gen).tolist() for n in (330, 150)]


def options(name: str, files: dict[str, Path], budget: int) -> dict[str, Any]:
    """Options of a plugin that keeps `budget` tokens, a multiple of 64."""
    own: dict[str, Any] = {"budget": budget}
    if name == "trim_kv":
        own |= {"gates": str(files["gates"]), "stride": 64}
    if name == "think_kv":
        own |= {"stride": 64, "schedule": [32, 16, 8, 4], "thoughts": str(files["thoughts"])}
    if name == "layer_defensive_kv":
        own |= {"profile": str(files["profile"])}
    return own


def run(
    files: dict[str, Path], name: str | None, look: Any = lambda llm: None, **own: Any
) -> tuple[list[list[int]], Any]:
    """Greedy tokens of the prompts, and what `look` sees in the engine afterwards."""
    from vllm import SamplingParams

    import vllm_ext
    from vllm_ext.evaluation.engine import engine

    ours = vllm_ext.engine_args(name, **{name: own}) if name else {}
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    with engine(files["model"], BASE | ours) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts()], greedy, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs], look(llm)


def pool(llm: Any) -> dict[str, int]:
    """Blocks of the pool that are free, and blocks that evictions freed while requests ran."""
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    groups = manager.coordinator.single_type_managers
    return {"free": manager.block_pool.get_num_free_blocks(), "freed": sum(m.blocks_freed for m in groups)}


@pytest.fixture(scope="module")
def stock(files: dict[str, Path]) -> tuple[list[list[int]], int]:
    return run(files, None, lambda llm: llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
               .block_pool.get_num_free_blocks())  # fmt: skip


PLUGINS = ["defensive_kv", "layer_defensive_kv", "rest_kv", "proto_kv", "think_kv", "trim_kv"]


@pytest.mark.parametrize("name", PLUGINS)
def test_evictions_free_blocks_and_none_is_lost(files, stock, name):
    tokens, found = run(files, name, pool, **options(name, files, 64))
    assert [len(t) for t in tokens] == [TOKENS, TOKENS]
    assert found["free"] == stock[1]
    assert found["freed"] >= (330 - 64) // 32 - 1
    assert tokens != stock[0]  # a random model notices that most of its prompt is gone


@pytest.mark.parametrize("name", [*PLUGINS, "random_kv"])
def test_a_budget_that_covers_the_request_gives_stock_tokens(files, stock, name):
    own = options(name, files, 768)  # the layers of half the budget hold 384 tokens
    tokens, found = run(files, name, pool, **own)
    assert tokens == stock[0]
    assert found == {"free": stock[1], "freed": 0}


def test_gates_see_the_inputs_of_the_attention_blocks(files):
    """What the engine stores beside the cache equals gates applied to a transformers model's activations."""
    from transformers import AutoModelForCausalLM

    from vllm_ext.kernels.kv_score_trim import log_retention
    from vllm_ext.kv_managers import trim_gates

    def stored(llm: Any) -> list[torch.Tensor]:
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention import Attention

        layers = get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention).values()
        return [layer.impl.side[1:, ..., 0].transpose(0, 1).flatten(1).clone() for layer in layers]

    tokens, sides = run(files, "trim_kv", stored, **options("trim_kv", files, 768))
    gates = trim_gates.load(files["gates"])
    model = AutoModelForCausalLM.from_pretrained(files["model"], dtype=torch.float32).eval()
    seen: dict[int, list[torch.Tensor]] = {}
    for i, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda m, a, out, i=i: seen.setdefault(i, []).append(out[0]))
    with torch.no_grad():
        for prompt, output in zip(prompts(), tokens):
            model(torch.tensor([prompt + output[:-1]]))
    for i, side in enumerate(sides):
        weights = (w.float() for w in gates.layer(i))
        expected = log_retention(torch.cat(seen[i]), *weights, gates.activation).T
        for head in range(2):
            written = side[head][side[head] != 0].sort().values
            torch.testing.assert_close(written, expected[head].sort().values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "own", "word"),
    [
        ("trim_kv", {"gates": "nowhere.safetensors"}, "trim_kv.gates 'nowhere.safetensors' cannot be read"),
        ("trim_kv", {}, "trim_kv.gates is empty and no gates are shipped for this model"),
        ("layer_defensive_kv", {}, "layer_defensive_kv.profile is empty"),
        ("layer_defensive_kv", {"profile": "smollm2-135m"}, "measured on another model"),
        ("defensive_kv", {"ratio": 0.0}, "defensive_kv.ratio must be above 0"),
        ("rest_kv", {"ratio": 1.5}, "rest_kv.ratio must be at most 1"),
        ("proto_kv", {"budget": 32}, "sinks and window"),
        ("think_kv", {"budget": 1000}, "multiple of think_kv.block_size"),
        ("think_kv", {"thoughts": "nowhere.json"}, "think_kv.thoughts 'nowhere.json' holds no thresholds"),
    ],
)
def test_bad_input_is_refused_before_weights_load(files, name, own, word):
    import vllm_ext
    from vllm_ext.options import ConfigError

    with pytest.raises(ConfigError, match=word.replace(".", r"\.")):
        start(files, vllm_ext.engine_args(name, **{name: own}))


def start(files: dict[str, Path], ours: dict[str, Any]) -> None:
    """Check a configuration as an engine does; loads no weights."""
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs(model=str(files["model"]), **BASE | ours).create_engine_config()
