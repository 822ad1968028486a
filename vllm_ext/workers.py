"""Plugins in worker processes: `plugin.attach(worker)` runs once a worker, before its model is built."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from vllm_ext import config

MODULE = "vllm.v1.worker.worker_base"
"""Importing it takes seconds, so a process that may never have a worker does not."""


undo: list[Callable[[], None]] = []
"""What `attach` has changed in this process; taken back before the next engine's worker, which may be a stock one."""


def install(*, load: bool) -> list[Callable[[], None]]:
    """Extend vLLM's WorkerBase in this process; returns what takes it back.

    Args:
        load: import vLLM's workers if they are not imported yet. Processes that run a worker have imported them before
            they load plugins; the others need it only once they build an engine that selects a plugin.
    """
    module = importlib.import_module(MODULE) if load else sys.modules.get(MODULE)
    base = getattr(module, "WorkerBase", None)
    if base is None or hasattr(base.__init__, "vllm_ext"):
        return []
    own = base.__init__
    base.__init__ = _attaching(own)
    return [functools.partial(setattr, base, "__init__", own)]


def _attaching(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        while undo:
            undo.pop()()
        for plugin in config.from_additional(self.vllm_config.additional_config).values():
            if hasattr(plugin, "attach"):
                plugin.attach(self)

    vars(__init__)["vllm_ext"] = True
    return __init__
