"""TRIM-KV's gates inside a running vLLM model: each attention block's input is gated before its QKV projection."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_ext.kernels.kv_score_trim import log_retention
from vllm_ext.kv_managers.support import side_cache
from vllm_ext.options import ConfigError

if TYPE_CHECKING:
    from vllm_ext.kv_managers.trim_kv import TrimKV

_weights: dict[str, tuple[tuple[Tensor, Tensor, Tensor, Tensor], str]] = {}
"""Attention layer -> its gate's weights and activation. Graphs hold the name; what it stands for never changes."""


@torch.library.custom_op("vllm_ext::retention_gate", mutates_args=("out",))
def retention_gate(x: Tensor, out: Tensor, layer: str) -> None:
    """Write the log retention of tokens `x` [T, D] into the first rows of `out` [most tokens, H, 1] fp32."""
    weights, activation = _weights[layer]
    out[: x.shape[0], :, 0] = log_retention(x, *weights, activation)


@retention_gate.register_fake
def _(x: Tensor, out: Tensor, layer: str) -> None:
    return None


def attach(method: TrimKV, worker: Any) -> None:
    """Install the gates when the worker has loaded its model, and their cache before any graph is captured."""
    load, warm_up = worker.load_model, worker.compile_or_warm_up_model

    @functools.wraps(load)
    def load_model(*args: Any, **kwargs: Any) -> Any:
        done = load(*args, **kwargs)
        install(method, worker.vllm_config, worker.model_runner.get_model())
        return done

    @functools.wraps(warm_up)
    def compile_or_warm_up_model(*args: Any, **kwargs: Any) -> Any:
        for layer in _attention(worker.vllm_config).values():
            side_cache(layer, method)
        return warm_up(*args, **kwargs)

    worker.load_model, worker.compile_or_warm_up_model = load_model, compile_or_warm_up_model


def _attention(vllm_config: Any) -> dict[str, Any]:
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    return get_layers_from_vllm_config(vllm_config, Attention)


def install(method: TrimKV, vllm_config: Any, model: Any) -> None:
    """Hook a gate before the QKV projection of every attention layer of `model`.

    Raises:
        ConfigError: the model's attention blocks have no `qkv_proj`.
    """
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.model_executor.models.utils import extract_layer_index

    gates = method.load_gates(vllm_config.model_config.hf_text_config)
    tokens = vllm_config.scheduler_config.max_num_batched_tokens
    for name, layer in _attention(vllm_config).items():
        block = model.get_submodule(name.rsplit(".", 1)[0])
        if not hasattr(block, "qkv_proj"):
            raise ConfigError(
                f"trim_kv reads the input of qkv_proj, which {type(block).__name__} does not have; drop the plugin."
            )
        heads, device = layer.num_kv_heads, next(block.parameters()).device
        first = get_tensor_model_parallel_rank() * heads
        w1, b1, w2, b = gates.layer(extract_layer_index(name), slice(first, first + heads))
        dtype = vllm_config.model_config.dtype
        outer = (w1.to(device, dtype), b1.to(device, dtype), w2.to(device, torch.float32), b.to(device, torch.float32))
        _weights[name] = outer, gates.activation
        out = torch.zeros(tokens, heads, 1, device=device)
        layer.impl.side_input = out
        block.qkv_proj.register_buffer("log_retention", out, persistent=False)
        block.qkv_proj.register_forward_pre_hook(functools.partial(_gate, name))


def _gate(name: str, module: Any, args: tuple[Any, ...]) -> None:
    torch.ops.vllm_ext.retention_gate(args[0], module.log_retention, name)
