"""Makes our attention backends known to vLLM under their own names, in every process and on every platform."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

from vllm_ext.attention_backends.method import BACKEND_NAME as SPARSE
from vllm_ext.kv_managers.method import BACKEND_NAME as EVICTION

PATHS = {
    SPARSE: {
        "cuda": "vllm_ext.attention_backends.cuda_backend.SparseFlashBackend",
        "cpu": "vllm_ext.attention_backends.cpu_backend.SparseCPUBackend",
    },
    EVICTION: {
        "cuda": "vllm_ext.kv_managers.cuda_backend.EvictionFlashBackend",
        "cpu": "vllm_ext.kv_managers.cpu_backend.EvictionCPUBackend",
    },
}
"""Name -> platform -> class of the backend; imported when an engine selects it."""

Undo = Callable[[], None]


def restore(name: str, path: str) -> Any:
    """Unpickle the member `name` of AttentionBackendEnum, registering it first where it is not known yet."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(name, path)
    return AttentionBackendEnum[name]


def _reduce(member: Any) -> Any:
    # vLLM pickles an added member by value inside VllmConfig. A spawned engine unpickles that before it loads
    # plugins and would not know the value, so ours carries the function that registers it.
    if member.name in PATHS:
        return restore, (member.name, member.value)
    return member.__reduce_ex__(2)


def install(platform: str) -> list[Undo]:
    """Register the names; idempotent.

    Args:
        platform: "cuda" or "cpu".

    Returns:
        Functions that take each change back.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for name, paths in PATHS.items():
        restore(name, paths[platform])
    copyreg.pickle(AttentionBackendEnum, _reduce)
    undo: list[Undo] = [lambda: copyreg.dispatch_table.pop(AttentionBackendEnum, None)]  # type: ignore[list-item]
    return undo + (_honour_on_cpu() if platform == "cpu" else [])


def _honour_on_cpu() -> list[Undo]:
    """CpuPlatform ignores the selected backend; let it honour ours, with the check that CUDA makes."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    cls: Any = type(current_platform)
    members = [AttentionBackendEnum[name] for name in PATHS]
    original, before = cls.get_attn_backend_cls, vars(cls)

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> Any:
        member = selected_backend
        if member not in members:
            return original(selected_backend, attn_selector_config, num_heads)
        reasons = member.get_class().validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(f"attention backend {member.name} cannot serve this model: {'; '.join(reasons)}.")
        return member.get_path()

    own = before.get("get_attn_backend_cls")
    cls.get_attn_backend_cls = classmethod(get_attn_backend_cls)

    def undo() -> None:
        if own is not None:
            cls.get_attn_backend_cls = own
        else:
            del cls.get_attn_backend_cls

    return [undo]
