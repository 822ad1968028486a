"""Machine code of the look-up drafters, kept on disk: the first start of a worker compiles it, later ones load it.

numba's own cache asks whether the file of a function has changed, not whether those of its callees have. Here a folder
is named by a hash of all that the code depends on, `~/.cache/vllm-ext/compiled/<hash>`, so nothing in it is ever stale.
Each function and signature has files of its own, replaced atomically: workers that start at once write the same twice.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.caching import IndexDataCacheFile, NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.sigutils import normalize_signature

from vllm_ext.models import cache_dir

logger = logging.getLogger("vllm.vllm_ext")

SOURCES = ("automaton.py", "code_cache.py", "lookup.py", "normal_hedge.py", "stream.py", "tables.py")
"""Files of this folder whose text decides what is compiled."""


@functools.cache
def digest(folder: Path = Path(__file__).parent) -> str:
    """16 hex digits of the SOURCES in a folder, the versions of what compiles them, and the CPU with its features."""
    cpu = cpu_target.target_context.codegen().magic_tuple()
    versions = (sys.version, numba.__version__, llvmlite.__version__, np.__version__, cpu)
    found = hashlib.sha256(repr(versions).encode())
    for name in SOURCES:
        found.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return found.hexdigest()[:16]


@functools.cache
def _complain(reason: str) -> None:
    """One log line for each reason and process."""
    logger.warning("The look-up drafters are compiled at this start, the cache of their code failed: %s", reason)


@contextmanager
def _or_compile() -> Iterator[None]:
    """Whatever goes wrong with a file, a damaged one included, costs time only."""
    try:
        yield
    except Exception as error:
        _complain(f"{type(error).__name__}: {error}")


def _private(folder: Path) -> Path:
    """`folder`, made if need be; OSError if another user could have put code there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to another user or is writable by others")
    return folder


class CodeCache(NullCache):
    """What numba asks for the code of one function; plain numba takes `FunctionCache` for it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = f"{Path(function.__code__.co_filename).stem}.{function.__qualname__}"

    @property
    def cache_path(self) -> str:
        """The folder."""
        return str(cache_dir() / "compiled" / digest())

    def _file(self, signature: Any) -> IndexDataCacheFile:
        folder = _private(Path(self.cache_path))
        name = f"{self.name}-{hashlib.sha256(str(signature).encode()).hexdigest()[:16]}"
        return IndexDataCacheFile(str(folder), name, source_stamp=None)

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        """The compiled function for a signature, None if it has to be compiled."""
        target_context.refresh()
        with _or_compile():
            kept = self._file(sig).load(self.name)
            return kept and CompileResult._rebuild(target_context, *kept)
        return None

    def save_overload(self, sig: Any, data: CompileResult) -> None:
        """Keep what was compiled."""
        with _or_compile():
            if data.library.has_dynamic_globals:
                raise TypeError(f"{self.name} holds addresses of this process")
            file = self._file(sig)
            file.flush()  # `save` reads the index first, which may be what is damaged
            file.save(self.name, data._reduce())


def entry(function: Callable[..., Any]) -> Any:
    """`njit(nogil=True)` for a function that Python calls; its callees are part of its code and need no cache."""
    dispatcher = numba.njit(nogil=True)(function)
    dispatcher._cache = CodeCache(function)
    return dispatcher


def callback(signature: Any) -> Callable[[Callable[..., Any]], CFunc]:
    """`cfunc` of a signature."""

    def compiled(function: Callable[..., Any]) -> CFunc:
        made = CFunc(function, normalize_signature(signature), locals={}, options={})
        made._cache = CodeCache(function)
        made.compile()
        return made

    return compiled
