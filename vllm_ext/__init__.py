"""vllm-ext: plugins for an unmodified vLLM. `vllm_ext.engine_args("quest", quest={"budget": 2048})`."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def engine_args(*names: str, **options: dict[str, Any]) -> dict[str, Any]:
    """Stock engine arguments that switch the named plugins on, for `LLM(model, **engine_args(...))`.

    Args:
        names: plugins of the catalogue, e.g. `"quest"`.
        options: one mapping of option to value per plugin, e.g. `quest={"budget": 2048}`.

    Raises:
        vllm_ext.options.ConfigError: unknown plugin or option, wrong type, conflict.
    """
    from vllm_ext.config import expand
    from vllm_ext.plugin import register

    register()
    return expand(names, options).engine_args
