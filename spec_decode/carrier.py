"""Which of vLLM's two model runners will serve, asked before there is a VllmConfig."""

from __future__ import annotations


def runner() -> str:
    """ "v1" or "v2": vLLM's own setting if there is one, else v2, but v1 on CPUs, where V2 lacks Triton.

    `limits.check` refuses if vLLM decides otherwise for a reason that shows only later.
    """
    try:
        from vllm import envs
        from vllm.platforms import current_platform
    except ImportError:  # `vllm-ext args` where vLLM is not installed
        return "v2"
    if envs.VLLM_USE_V2_MODEL_RUNNER is not None:
        return "v2" if envs.VLLM_USE_V2_MODEL_RUNNER else "v1"
    return "v1" if current_platform.is_cpu() else "v2"
