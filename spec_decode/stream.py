"""The look-up step as a host function in a CUDA stream: the Python thread launches it and goes on.

The GPU copies lengths out, the driver's callback thread runs the compiled step (no Python, no lock of the interpreter),
the GPU copies the drafts in. Everything it touches stays alive and unmoved in this object.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_ext.spec_decode import lookup
from vllm_ext.spec_decode.code_cache import callback, entry
from vllm_ext.spec_decode.tables import REQUEST, LookupDrafter

DEPTH = 8
"""Blocks of arguments in turn; more than steps can be in flight."""

# by name: an address would hold in this process only, and its code could not be kept
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.CPointer(types.int64)))
_MONOTONIC = 1


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """An address as a pointer."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@njit(nogil=True)
def _i32(block, at, shape):
    return carray(_pointer(block[at]), shape, np.int32)


@njit(nogil=True)
def _i64(block, at, shape):
    return carray(_pointer(block[at]), shape, np.int64)


@njit(nogil=True)
def _f64(block, at, shape):
    return carray(_pointer(block[at]), shape, np.float64)


@entry
def run_block(block):
    """Rebuild the arrays from the addresses and shapes in a block, fill in lengths, run the step."""
    p, s, e, h, c, fields = block[13], block[14], block[15], block[16], block[17], block[18]
    local = (
        _i32(block, 0, (p, 5, s)), _i32(block, 1, (p, 4, e)), _i32(block, 2, (p, h)), _i64(block, 3, (p, 6)),
        _i32(block, 4, (p, c)), _i64(block, 5, (p, fields)),
    )  # fmt: skip
    s, e, h, c = block[19], block[20], block[21], block[22]
    shared = (
        _i32(block, 6, (2, 5, s)), _i32(block, 7, (2, 4, e)), _i32(block, 8, (2, h)), _i64(block, 9, (2, 6)),
        _i32(block, 10, (2, c)), _i64(block, 11, (2,)),
    )  # fmt: skip
    settings, arms = _i64(block, 12, (6,)), _i64(block, 23, (block[24],))
    n = block[24]
    hedge = (
        _f64(block, 40, (p, block[41])), _i64(block, 42, (p, block[43])), _f64(block, 44, (n,)), _f64(block, 45, (n,)),
    )  # fmt: skip
    counters = _i64(block, 25, (block[26], block[27]))
    tokens = _i32(block, 28, (block[29], block[30]))
    requests = _i64(block, 31, (block[32], block[33]))
    drafts, matched = _i64(block, 34, (block[32], block[35])), _i32(block, 36, (block[32],))
    total, sampled = _i32(block, 37, (block[29],)), _i32(block, 38, (block[32],))
    clock = np.zeros(4, np.int64)
    _clock_gettime(_MONOTONIC, clock.ctypes)
    for r in range(block[39]):
        requests[r, 2] = total[requests[r, 1]] if sampled[r] > 0 else 0
    judged = _i32(block, 47, (block[32], block[48]))
    lookup.step(local, shared, settings, arms, hedge, requests, tokens, judged, drafts, matched, counters)
    _clock_gettime(_MONOTONIC, clock[2:].ctypes)
    _f64(block, 46, (1,))[0] += (clock[2] - clock[0]) + (clock[3] - clock[1]) * 1e-9


@callback(types.void(types.CPointer(types.int64)))
def _callback(pointer):
    run_block(carray(pointer, (49,)))


def _driver() -> Any:
    """libcuda, which torch has loaded."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchHostFunc.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return library


class _Block:
    """The arguments of one step: addresses, shapes, and pinned buffers of the sizes of the largest batch."""

    def __init__(self, drafter: LookupDrafter, tokens: np.ndarray, requests: int, pin: bool) -> None:
        k = drafter.settings.drafts
        self.table = np.zeros((requests, len(REQUEST)), np.int64)
        self.drafts = torch.zeros(requests, k, dtype=torch.int64, pin_memory=pin)
        self.matched = torch.zeros(requests, dtype=torch.int32, pin_memory=pin)
        self.total = torch.zeros(tokens.shape[0], dtype=torch.int32, pin_memory=pin)
        self.sampled = torch.zeros(requests, dtype=torch.int32, pin_memory=pin)
        self.judged = torch.full((requests, k + 1), -1, dtype=torch.int32, pin_memory=pin)
        self.done = torch.cuda.Event() if pin else None
        self.words = words = np.zeros(49, np.int64)
        local, shared = drafter.local, drafter.shared
        arrays = [*local, *shared, drafter.numbers]
        words[:13] = [a.ctypes.data for a in arrays]
        words[13:19] = [local[0].shape[0], local[0].shape[2], local[1].shape[2], local[2].shape[1],
                        local[4].shape[1], local[5].shape[1]]  # fmt: skip
        words[19:23] = [shared[0].shape[2], shared[1].shape[2], shared[2].shape[1], shared[4].shape[1]]
        words[23:25] = [drafter.arms.ctypes.data, len(drafter.arms)]
        words[25:28] = [drafter.counters.ctypes.data, *drafter.counters.shape]
        words[28:31] = [tokens.ctypes.data, *tokens.shape]
        words[31] = self.table.ctypes.data
        words[33:36] = [len(REQUEST), self.drafts.data_ptr(), k]
        floats, ints, cost, scratch = drafter.hedge
        words[40:44] = [floats.ctypes.data, floats.shape[1], ints.ctypes.data, ints.shape[1]]
        words[44:47] = [cost.ctypes.data, scratch.ctypes.data, drafter.seconds.ctypes.data]
        words[47:49] = [self.judged.data_ptr(), k + 1]
        words[36:39] = [self.matched.data_ptr(), self.total.data_ptr(), self.sampled.data_ptr()]


class StreamStep:
    """Runs `LookupDrafter`'s step on the current stream.

    Args:
        drafter: its arrays are used by the callback thread from now on.
        tokens: [rows, length] int32 in host memory that the GPU writes (the texts of vLLM's request slots).
        total: [rows] int32 on the GPU, the length of each text.
    """

    def __init__(self, drafter: LookupDrafter, tokens: np.ndarray, total: torch.Tensor) -> None:
        self._pin = total.device.type == "cuda"
        self._drafter, self._tokens, self._total = drafter, tokens, total
        most = drafter.slots
        self._blocks = [_Block(drafter, tokens, most, self._pin) for _ in range(DEPTH)]
        self._next = 0
        self._library = _driver() if self._pin else None
        drafter.settle = self._wait

    def _wait(self) -> None:
        """Until the last step that was enqueued is done."""
        last = self._blocks[self._next - 1]
        if last.done is not None:
            last.done.synchronize()

    def run(
        self,
        table: np.ndarray,
        count: int,
        num_sampled: torch.Tensor,
        drafts: torch.Tensor,
        matched: torch.Tensor | None = None,
        judged: torch.Tensor | None = None,
    ) -> None:
        """Enqueue one step.

        Args:
            table: [R', 5] int64 from `LookupDrafter.rows`; lengths are filled in from the GPU's.
            count: R, rows that are requests of the batch.
            num_sampled: [R] on the GPU; 0 = nothing was sampled.
            drafts: [R, K] int64 and matched: [R] int32 on the GPU, written in stream order.
            judged: [R, K + 1] int32 on the GPU, see `lookup.step`; None = no model.
        """
        block = self._blocks[self._next]
        self._next = (self._next + 1) % DEPTH
        if block.done is not None:
            block.done.synchronize()  # long done: DEPTH steps ago
        block.table[: len(table)] = table
        block.words[32], block.words[39] = len(table), count
        block.total.copy_(self._total, non_blocking=True)
        block.sampled[:count].copy_(num_sampled[:count].to(torch.int32), non_blocking=True)
        if judged is not None:
            block.judged[:count].copy_(judged, non_blocking=True)
        if self._library is None:
            run_block(block.words)
        else:
            stream = torch.cuda.current_stream().cuda_stream
            status = self._library.cuLaunchHostFunc(stream, _callback.address, block.words.ctypes.data)
            if status:
                raise RuntimeError(f"cuLaunchHostFunc failed with CUDA error {status}")
        drafts.copy_(block.drafts[:count], non_blocking=True)
        if matched is not None:
            matched.copy_(block.matched[:count], non_blocking=True)
        if block.done is not None:
            block.done.record()
