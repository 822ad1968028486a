"""The block that an engine with plugins logs once at start."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def option_text(plugin: Any) -> str:
    """The options that differ from their defaults, `budget 2048 (default 1024)`; or `defaults`."""
    changed = []
    for f in dataclasses.fields(plugin):
        value = getattr(plugin, f.name)
        if f.init and value != f.default:
            changed.append(f"{f.name} {_text(value)} (default {_text(f.default)})")
    return ", ".join(changed) or "defaults"


def _text(value: Any) -> str:
    return (
        "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else "null" if value is None else str(value)
    )


def lines(plugins: Mapping[str, Any], vllm_config: Any) -> list[str]:
    """The lines of the banner.

    Args:
        plugins: the selected plugins by name; each says what it does through `banner(vllm_config)`.
        vllm_config: the finished VllmConfig.
    """
    import vllm_ext

    mode = vllm_config.compilation_config.cudagraph_mode
    rows = [("model", str(vllm_config.model_config.model)), ("graphs", getattr(mode, "name", None) or "NONE")]
    for name, plugin in plugins.items():
        rows += [(name, option_text(plugin)), *((f"  {k}", str(v)) for k, v in plugin.banner(vllm_config).items())]
    width = max(len(label) for label, _ in rows)
    title = f"vllm-ext {vllm_ext.__version__}: {', '.join(plugins)}"
    return [title, *(f"  {label:<{width}}  {text}" for label, text in rows)]


def print_banner(plugins: Mapping[str, Any], vllm_config: Any) -> None:
    """Log the banner through vLLM's logger, as one record."""
    from vllm.logger import init_logger

    init_logger("vllm.vllm_ext").info("%s", "\n".join(lines(plugins, vllm_config)))
