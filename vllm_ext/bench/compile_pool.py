"""Compile Triton kernels in parallel: forked processes fill Triton's cache on disk, then this process finds them there.

A job calls the kernels' own launchers on tensors of the device "meta": no memory, no launch. The pool must be opened
before this process touches CUDA, since a process that has cannot be forked.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any


@contextlib.contextmanager
def compile_only(*kernels: Any) -> Iterator[None]:
    """Launches of these `triton.jit` functions compile and do not run."""

    def wrap(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: run(*args, **(kwargs | {"warmup": True}))

    for kernel in kernels:
        kernel.run = wrap(type(kernel).run.__get__(kernel))
    try:
        yield
    finally:
        for kernel in kernels:
            del kernel.run


class CompilePool:
    """Processes that compile; `submit` jobs early, `wait` before measuring."""

    def __init__(self, workers: int | None = None) -> None:
        """`workers` processes, by default one a CPU core and at most 16.

        Raises:
            RuntimeError: CUDA is initialised in this process.
        """
        import torch

        if torch.cuda.is_initialized():
            raise RuntimeError("the compile pool must be opened before CUDA is used")
        count = workers or min(16, len(os.sched_getaffinity(0)))
        self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"))
        self._seen: dict[Any, Future[None]] = {}
        self._pool.submit(int).result()  # forks every process, now

    def submit(self, job: Callable[..., None], *args: Any) -> None:
        """Run `job(*args)` in some process, once for equal arguments; its errors come back when it is measured."""
        key = (job, repr(args))
        if key not in self._seen:
            self._seen[key] = self._pool.submit(job, *args)

    def wait(self) -> None:
        """Until every job is done."""
        for future in self._seen.values():
            future.exception()

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)
