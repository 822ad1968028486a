"""A KV cache of fixed size for the engines of these tests, which may share the GPU with others."""

from __future__ import annotations

from typing import Any

FIXED_CACHE: dict[str, Any] = {"kv_cache_memory_bytes": 4 << 30, "gpu_memory_utilization": 0.01}
"""The share sizes nothing then: vLLM only refuses to start where less of the GPU is free."""
