"""Memory that eviction holds beside the KV cache, and how it is taken off what vLLM plans for the cache."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm_ext.kv_managers.method import KVMethod

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FP32 = 4


def token_bytes(cfg: VllmConfig) -> int:
    """Keys and values of a token in all layers of a rank."""
    model, par = cfg.model_config, cfg.parallel_config
    row = model.get_num_kv_heads(par) * model.get_head_size() * model.dtype.itemsize
    return 2 * row * model.get_num_layers(par)


def side_bytes(method: KVMethod, cfg: VllmConfig) -> int:
    """What a method stores with a token in all layers of a rank; it has a slot for every slot of the cache."""
    model, par = cfg.model_config, cfg.parallel_config
    return FP32 * method.side_values * model.get_num_kv_heads(par) * model.get_num_layers(par)


def gram_bytes(method: KVMethod, cfg: VllmConfig) -> int:
    """Gram matrices [Hq, D, D] fp32 of the output projections of all layers of a rank."""
    if not method.keeps_grams():
        return 0
    model, par = cfg.model_config, cfg.parallel_config
    return FP32 * model.get_num_attention_heads(par) * model.get_head_size() ** 2 * model.get_num_layers(par)


def left_for_cache(method: KVMethod, cfg: VllmConfig, available: int) -> int:
    """Bytes of `available` that the KV cache may take."""
    token = token_bytes(cfg)
    return max(0, available - gram_bytes(method, cfg)) * token // (token + side_bytes(method, cfg))


def attach(method: KVMethod, worker: Any) -> None:
    """Let the worker report what is left. (Query windows lie beside the weights, which vLLM measures itself.)"""
    original = worker.determine_available_memory

    @functools.wraps(original)
    def determine_available_memory() -> int:
        return left_for_cache(method, worker.vllm_config, original())

    worker.determine_available_memory = determine_available_memory


def text(method: KVMethod, cfg: VllmConfig) -> str:
    """For the banner; "" if nothing is held beside the cache."""
    parts = []
    if grams := gram_bytes(method, cfg):
        parts.append(f"{grams / 2**20:.0f} MiB of output Gram matrices")
    if side := side_bytes(method, cfg):
        parts.append(f"{side} bytes a token ({side / (side + token_bytes(cfg)):.1%} of the KV memory)")
    return ", ".join(parts)
