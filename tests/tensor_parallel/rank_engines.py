"""Engines of one and two ranks: worker processes under a process that runs no model, so that it may start many."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

BASE = {
    "dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 128, "seed": 0,
    "enforce_eager": True, "skip_tokenizer_init": True, "block_size": 32, "num_gpu_blocks_override": 128,
    "distributed_executor_backend": "mp", "disable_log_stats": False,
}  # fmt: skip
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else a rank needs a NUMA node of its own
    "OMP_NUM_THREADS": "1",
    "NUMBA_DISABLE_JIT": "1",  # compiling takes longer than these tests
    "TORCHDYNAMO_DISABLE": "1",  # else every rank compiles the lookup of its part of the vocabulary
}


class Ranks:
    """A process that starts engines one after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()

    def run(self, model: Any, ranks: int, plugins: dict[str, dict[str, Any]] | None = None, **job: Any) -> Any:
        """Outputs of an engine with `ranks` workers.

        Args:
            model: directory.
            ranks: tensor-parallel size.
            plugins: plugin -> options; None is stock.
            job: `prompts` (lists of ids), `count` (tokens of each output), `spawn` (workers are new processes, as vLLM
                starts them on CPUs, and no copies of this one, as on GPUs), further arguments of `vllm.LLM`.

        Returns:
            {"tokens": ids of each output, "attention", "kv": our counters, "stats": vLLM's, "ranks": what every worker
            has built}.
        """
        self._pipe.send({"model": str(model), "ranks": ranks, "plugins": plugins or {}, **job})
        assert self._pipe.poll(240), "no answer"
        found = self._pipe.recv()
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Any) -> None:
    """Answer jobs until there is none."""
    import traceback

    os.environ |= ENVIRONMENT
    while (job := pipe.recv()) is not None:
        try:
            pipe.send(_run(**job))
        except BaseException as error:
            pipe.send({"error": f"{error!r}\n{traceback.format_exc()}"})


@contextlib.contextmanager
def _start_method(spawn: bool) -> Iterator[None]:
    """How vLLM makes its worker processes; its CPU platform asks for new ones, its GPU platforms for copies."""
    from vllm.v1.executor import multiproc_executor

    own = multiproc_executor.get_mp_context
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("spawn" if spawn else "fork")
    try:
        yield
    finally:
        multiproc_executor.get_mp_context = own


def _run(
    model: str, ranks: int, plugins: dict[str, Any], prompts: list[list[int]], count: int, spawn: bool = False,
    **extra: Any,
) -> dict[str, Any]:  # fmt: skip
    from vllm import SamplingParams

    import vllm_ext
    from vllm_ext import kv_metrics, metrics, totals
    from vllm_ext.evaluation.engine import engine

    ours = vllm_ext.engine_args(*plugins, **plugins) if plugins else {}
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    with _start_method(spawn), engine(model, BASE | ours | {"tensor_parallel_size": ranks} | extra) as llm:
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        name = llm.llm_engine.vllm_config.instance_id
        kv = totals.Collector(name, kv_metrics.FAMILY, kv_metrics.HELP)
        kv.since_ns = 0
        return {
            "tokens": [list(o.outputs[0].token_ids) for o in done],
            "attention": metrics.read_totals(name),
            "kv": {name: value for name, _, value in kv.read()},
            "stats": {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")},
            "ranks": llm.llm_engine.model_executor.collective_rpc(_describe),
        }


def _describe(worker: Any) -> dict[str, Any]:
    """What one worker has built, as JSON types."""
    model = worker.get_model()
    experts = [m for m in model.modules() if hasattr(m, "routed_experts")]
    return {
        "process": os.getpid(),
        "routers": [type(m.router).__name__ for m in experts],
        "weights": [list(m.routed_experts.w13_weight.shape) for m in experts],
    }
