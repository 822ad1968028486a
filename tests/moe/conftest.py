"""Fixtures of the MoE tests: engines run in this process, one after the other, on one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

FAMILIES = ("mixtral", "qwen3_moe", "olmoe")


@pytest.fixture(scope="module", autouse=True)
def _in_process(in_process: None) -> None:
    """Every module of this folder starts engines."""


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_moe(family)`: directory of a random fp32 model with 8 experts, 2 a token, in 2 layers."""
    from vllm_ext.moe.models import tiny_moe

    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny_moe(tmp_path_factory.mktemp("moe") / family, family, vocab=256)
        return made[family]

    return get


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    """`with start(model, {"kern": {}}, max_num_seqs=4) as llm`: an engine in this process; None is stock."""

    @contextlib.contextmanager
    def engine(model: Path | str, plugins: dict[str, dict[str, Any]] | None = None, **extra: Any) -> Iterator[Any]:
        import vllm_ext
        from vllm_ext.evaluation.engine import engine as started

        base = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 256, "seed": 0}
        base |= {"enforce_eager": True, "skip_tokenizer_init": True, "num_gpu_blocks_override": 128}
        ours = vllm_ext.engine_args(*plugins, **plugins) if plugins else {}
        with started(model, base | ours | extra) as llm:
            yield llm

    return engine


@pytest.fixture(scope="session")
def generate() -> Callable[..., list[list[int]]]:
    """`generate(llm, prompts, n)`: greedy token ids, end-of-sequence ignored."""

    def run(llm: Any, prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]

    return run
