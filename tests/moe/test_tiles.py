"""Tables of tiles: which calls sonic_moe serves, what `moe tune` searches, and that vLLM finds what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ext.kernels.sonic_moe import default_tiles
from vllm_ext.moe import sonic, sonic_table, tune
from vllm_ext.moe.shape import SHAPES, Shape, from_config
from vllm_ext.options import ConfigError, build

SHAPE = Shape(8, 2, 64, 128)
DEVICE = "NVIDIA H100 80GB HBM3"


def write_table(path: Path, times: dict[int, tuple[float, float]], device: str = DEVICE) -> Path:
    rows = [
        {"tokens": t, "tiles": default_tiles(t).as_dict(), "time_s": ours, "stock_s": stock}
        for t, (ours, stock) in times.items()
    ]
    path.write_text(json.dumps({"device": device, "shape": vars(SHAPE), "results": rows}))
    return path


def test_calls_are_served_between_rows_that_serve(tmp_path: Path) -> None:
    times = {1: (2.0, 1.0), 16: (1.0, 1.2), 64: (1.0, 1.02), 256: (1.0, 1.01), 1024: (1.0, 1.3)}
    table = sonic_table.find(SHAPE, DEVICE, str(write_table(tmp_path / "t.json", times)))
    served = {t: table.covers(t) for t in (1, 8, 16, 40, 64, 65, 256, 500, 1024, 99999)}
    yes = {16, 40, 64, 1024, 99999}
    assert served == {t: t in yes for t in served}
    assert table.served() == [16, 64, 1024]
    assert table.tiles(40) == default_tiles(64)  # 40/16 > 64/40
    assert table.tiles(30) == default_tiles(16)


def test_wrong_tables_are_refused(tmp_path: Path) -> None:
    assert sonic_table.find(SHAPE, "no such GPU").rows == ()
    assert not sonic_table.find(SHAPE, "no such GPU").covers(64)
    (tmp_path / "x.json").write_text("{")
    other = write_table(tmp_path / "other.json", {}, device="NVIDIA A100")
    for file, word in ((tmp_path / "x.json", "no table"), (tmp_path / "none", "no table"), (other, "A100")):
        with pytest.raises(ConfigError, match=f"sonic_moe.table.*{word}.*moe tune"):
            sonic_table.find(SHAPE, DEVICE, str(file))


def test_tables_of_the_package_are_readable() -> None:
    for file in sonic_table.FOLDER.glob("*.json"):
        data = json.loads(file.read_text())
        shape = Shape(**data["shape"])
        assert file.name == sonic_table.file_name(shape, data["device"])
        assert sonic_table.find(shape, data["device"]).rows


@pytest.mark.parametrize("own_width", [True, False])
def test_shape_of_a_model(own_width: bool) -> None:
    config = {"num_experts_per_tok": 2, "hidden_size": 4096, "intermediate_size": 14336}
    config |= {"num_experts": 8, "moe_intermediate_size": 768} if own_width else {"num_local_experts": 8}
    want = Shape(8, 2, 4096, 768 if own_width else 14336)
    assert from_config(config) == from_config(SimpleNamespace(**config)) == want
    assert from_config(config, 2).n == want.n // 2


def vllm_config(**changes: Any) -> Any:
    """As much of a VllmConfig as `check` reads, of a layer of 8 experts."""
    hf = {"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64, "moe_intermediate_size": 128}
    model = {
        "runner_type": "generate", "is_moe": True, "model": "m", "quantization": None, "dtype": "torch.bfloat16",
        "hf_text_config": SimpleNamespace(**hf),
        "get_num_experts": lambda: 8, "get_num_experts_per_tok": lambda: 2,
    }  # fmt: skip
    parallel = {"enable_expert_parallel": False, "tensor_parallel_size": 1, "data_parallel_size": 1}
    parallel |= {"prefill_context_parallel_size": 1, "eplb_config": SimpleNamespace(num_redundant_experts=0)}
    return SimpleNamespace(
        model_config=SimpleNamespace(**model | {k: v for k, v in changes.items() if k in model}),
        parallel_config=SimpleNamespace(**parallel | {k: v for k, v in changes.items() if k in parallel}),
        lora_config=None,
        kernel_config=SimpleNamespace(moe_backend="auto"),
    )


def platform(monkeypatch: pytest.MonkeyPatch, cuda: bool = True, capability: tuple[int, int] = (9, 0)) -> None:
    """Let vLLM's platform be a GPU."""
    from vllm.platforms import current_platform

    answers = {
        "is_cpu": not cuda, "is_cuda": cuda, "has_device_capability": lambda c: capability >= c,
        "get_device_name": lambda: DEVICE,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(current_platform, name, answer if callable(answer) else lambda a=answer: a, raising=False)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"is_moe": False}, "mixture-of-experts"), ({"quantization": "fp8"}, "fp8"),
        ({"dtype": "torch.float32"}, "--dtype"),
        ({"tensor_parallel_size": 4}, "multiples of 64"), ({"tensor_parallel_size": 3}, "divisor"), ({}, "moe tune"),
    ],
)  # fmt: skip
def test_refusals(changes: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    platform(monkeypatch)
    with pytest.raises(ConfigError, match=word):
        sonic.SonicMoE().check(vllm_config(**changes))


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    platform(monkeypatch, capability=(8, 0))
    with pytest.raises(ConfigError, match="Hopper"):
        sonic.SonicMoE().check(vllm_config())


def test_a_table_or_all_calls_are_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    platform(monkeypatch)
    path = write_table(tmp_path / "t.json", {64: (1.0, 1.1), 512: (1.0, 2.0)})
    plugin = build(sonic.SonicMoE, "sonic_moe", {"table": str(path)})
    plugin.check(vllm_config())
    assert "64 to 512" in plugin.banner(vllm_config())["kernels"]
    every = build(sonic.SonicMoE, "sonic_moe", {"calls": "all"})
    every.check(vllm_config())
    assert sonic.SonicExperts(SHAPE, every._table(SHAPE), True).covers(1)


def test_ranks_have_a_part_of_each_expert_or_all_of_some() -> None:
    """vLLM cuts experts over tensor- and data-parallel ranks alike, or shares them out with EPLB's copies."""
    both = {"tensor_parallel_size": 2, "data_parallel_size": 2}
    assert sonic._shape(vllm_config(**both)) == Shape(8, 2, 64, 32)
    copies = SimpleNamespace(num_redundant_experts=4)
    shared = vllm_config(**both, enable_expert_parallel=True, eplb_config=copies)
    assert sonic._shape(shared) == Shape(3, 2, 64, 128)


def test_a_rank_with_half_of_the_experts_reads_the_table_at_half_of_the_tokens(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.json", {64: (1.0, 1.1), 512: (1.0, 2.0), 1024: (2.0, 1.0)})
    table = sonic_table.find(SHAPE, DEVICE, str(path))
    alone, shared = sonic.SonicExperts(SHAPE, table, False), sonic.SonicExperts(SHAPE, table, False, ranks=2)
    for tokens in (64, 500, 512, 1024):
        assert shared.covers(2 * tokens) == alone.covers(tokens)
        assert shared.tiles(2 * tokens) == alone.tiles(tokens)
    assert shared.covers(1024)
    assert not alone.covers(1024)


def test_tuned_files_are_found_by_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_configs

    config = tune.seeds(SHAPE, 64)[0] | {"BLOCK_SIZE_N": 256}
    rows = [{"tokens": t, "config": config, "time_s": 1.0, "default_s": 2.0, "tried": 3} for t in (1, 64)]
    path = tmp_path / tune.file_name(SHAPE)
    tune._save(path, SHAPE, rows)
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    get_moe_configs.cache_clear()
    try:
        found = get_moe_configs(SHAPE.experts, SHAPE.n, None)
    finally:
        get_moe_configs.cache_clear()
    assert found == {1: config | {"SPLIT_K": 1}, 64: config | {"SPLIT_K": 1}}
    assert tune._previous(path) == rows


def test_results_of_another_device_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / tune.file_name(SHAPE)
    tune._save(path, SHAPE, [{"tokens": 1, "config": {}}])
    record = tune._record(path)
    record.write_text(record.read_text().replace('"device": "', '"device": "another '))
    assert tune._previous(path) == []


class NoPool:
    """Compiles nothing."""

    def submit(self, *_: Any) -> None: ...

    def wait(self) -> None: ...

    def close(self) -> None: ...


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends after two numbers of tokens; the next run searches the third alone, and vLLM's file holds all three."""
    platform(monkeypatch)
    asked: list[int] = []

    def search(_layer: Any, tokens: int, *_: Any) -> tune.Found:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(tokens)
        return tune.Found(tokens, tune.seeds(SHAPE, tokens)[0], 1e-4 * tokens, 2e-4 * tokens, 3)

    monkeypatch.setattr(tune, "search", search)
    monkeypatch.setattr(tune, "CompilePool", NoPool)
    monkeypatch.setattr(tune.moe, "make_layer", lambda shape: SimpleNamespace(shape=shape))

    def run() -> tune.Result:
        return tune.tune(SHAPE, [1, 64, 512], tmp_path, 1.0, False, lambda *_: None)

    with pytest.raises(KeyboardInterrupt):
        run()
    asked[:] = [0]
    result = run()
    assert asked == [0, 512]
    assert [r["tokens"] for r in result.rows] == [1, 64, 512]
    assert set(json.loads(result.path.read_text())) == {"triton_version", "1", "64", "512"}


def test_search_climbs_to_a_better_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the seeds by single steps to a minimum that no seed is, and never slower than the default."""
    goal = {
        "BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 16, "num_warps": 4,
        "num_stages": 5,
    }  # fmt: skip

    def seconds(layer: Any, calls: Any, config: dict[str, int]) -> float:
        steps = (abs(tune.STEPS[f].index(config[f]) - tune.STEPS[f].index(goal[f])) for f in tune.FIELDS)
        return 1.0 + sum(steps)

    monkeypatch.setattr(tune, "time_of", seconds)
    layer = SimpleNamespace(shape=SHAPES["olmoe-1b-7b"], calls=lambda *_: [])
    found = tune.search(layer, 64, NoPool(), seconds=30)
    assert found.config == goal
    assert found.time_s == 1.0 < found.default_s
    assert tune.search(layer, 64, NoPool(), seconds=0).tried == 1  # out of time: the default is measured


def test_neighbours_fit_the_device() -> None:
    for start in tune.seeds(SHAPES["mixtral-8x7b"], 4096):
        found = list(tune.neighbours(start))
        assert found
        assert all(sum(c[f] != start[f] for f in tune.FIELDS) == 1 and tune.fits(c) for c in found)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["no-such-model"], "olmoe-1b-7b"), (["olmoe-1b-7b", "--expert-parallel", "3"], "divisor"),
        (["olmoe-1b-7b", "--expert-parallel", "0"], "at least 1"),
        (["olmoe-1b-7b"], "CUDA"), (["mixtral-8x7b", "--tensor-parallel", "3"], "divisor"),
    ],
)  # fmt: skip
def test_command_refuses(arguments: list[str], word: str, assert_refused: Any, tmp_path: Path) -> None:
    assert_refused(["moe", "tune", *arguments, "--out", str(tmp_path)], word)


def test_command_refuses_other_models(assert_refused: Any, tmp_path: Path) -> None:
    model = tmp_path / "config.json"
    model.write_text(json.dumps({"hidden_size": 64}))
    assert_refused(["moe", "tune", str(tmp_path)], "num_experts")
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64, "moe_intermediate_size": 128}
    model.write_text(json.dumps(moe | {"quantization_config": {"quant_method": "fp8"}}))
    assert_refused(["moe", "tune", str(tmp_path)], "quantized")


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("mapped", [False, True])
def test_compiling_needs_no_memory_and_launches_nothing(
    tokens: int, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel of a call is asked for its compilation alone, and is itself again afterwards."""
    from vllm_ext.kernels import moe_route, sonic_moe
    from vllm_ext.moe.sonic_warmup import compile_call

    kernels = [sonic_moe._up, sonic_moe._down, sonic_moe._combine, moe_route._place, moe_route._count]
    asked: list[str] = []

    def run(self: Any, *_: Any, grid: Any, warmup: bool, **__: Any) -> None:
        assert warmup
        asked.append(self.fn.__name__)

    monkeypatch.setattr(type(kernels[0]), "run", run)
    compile_call(Shape(64, 2, 4096, 14336), tokens, default_tiles(1), expert_map=mapped)
    sort = ["_count", "_place"] if tokens == 300 else []
    assert asked == [*sort, "_up", "_down", "_combine"]
    assert not any("run" in vars(k) for k in kernels)


def test_pool_runs_equal_jobs_once(tmp_path: Path) -> None:
    from vllm_ext.bench.compile_pool import CompilePool

    pool = CompilePool(2)
    for name in ("a", "b", "a"):
        pool.submit(write_line, tmp_path / name)
    pool.wait()
    pool.close()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "x", "b": "x"}


def write_line(path: Path) -> None:
    """A job that tells how often it ran."""
    with path.open("a") as file:
        file.write("x")
