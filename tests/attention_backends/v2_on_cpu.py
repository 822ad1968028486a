"""Model runner V2 on a CPU without a Triton CPU backend: vLLM's kernels run in Triton's interpreter. Only for tests.

Import it before vLLM. vLLM switches Triton off where no driver is active; one that claims to be keeps it on, and with
TRITON_INTERPRET=1 no kernel is ever compiled or launched through it.
"""

from __future__ import annotations

import dataclasses
import os
import random
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

import triton.backends


class InterpreterDriver:
    """The least of a Triton driver that vLLM and the interpreter ask for."""

    utils = None

    @classmethod
    def is_active(cls) -> bool:
        """Yes: the interpreter needs no device."""
        return True

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        import torch

        return torch.cpu

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", 0, 0)

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


if "cpu" not in triton.backends.backends:
    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=InterpreterDriver)


def tune_interpreter(overflow_checks: bool) -> None:
    """Take integer masks, as the compiler does; checks of every sum for overflow cost a third of the time."""
    import interpreter as own
    from triton.runtime import interpreter

    own.keep_language()
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=overflow_checks)

    builder = interpreter.InterpreterBuilder
    store = builder.create_masked_store

    def masked_store(self: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return store(self, pointer, value, mask, *rest)

    builder.create_masked_store = masked_store


def run(
    model: str, covering: dict[str, Any], sparse: dict[str, Any], lengths: list[int], output: int
) -> dict[str, Any]:
    """Stock, Quest with covering lists and Quest with sparse lists, two rounds each, all under runner V2."""
    from engines import counters, generate, leaked, outputs, runner, start, tokens, wrong_records

    tune_interpreter(overflow_checks=False)  # the kernels that run are vLLM's
    rnd = random.Random(0)
    prompts = [tokens(rnd, n) for n in lengths]
    found: dict[str, Any] = {}
    for name, plugin in (("stock", None), ("covering", {"quest": covering}), ("sparse", {"quest": sparse})):
        with start(model, plugin, max_num_batched_tokens=128, max_num_seqs=8) as llm:
            first = generate(llm, prompts, output)
            again = outputs(llm, prompts[::-1], output)[::-1]
            found[name] = {
                "runner": type(runner(llm)).__module__,
                "first": first,
                "again": [list(o.outputs[0].token_ids) for o in again],
                "cached": [o.num_cached_tokens for o in again],
                "leaked": leaked(llm),
            }
            if plugin:
                found[name] |= {"stats": counters(llm), "wrong_records": wrong_records(llm)[0]}
    return found
