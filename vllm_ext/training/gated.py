"""Retention gates as trainable parameters, and a frozen model whose attention they weight (TRIM-KV, training form)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from vllm_ext.kernels.kv_score_trim import ACTIVATIONS, capacity_loss, gated_bias, log_retention
from vllm_ext.kv_managers.fingerprint import fingerprint
from vllm_ext.kv_managers.trim_gates import TrimGates
from vllm_ext.options import ConfigError
from vllm_ext.training.model import Frozen, watched


class Gates(nn.Module):
    """Gates of all layers, fp32, as stacked parameters (shapes as in `TrimGates`)."""

    def __init__(self, model: dict[str, Any], activation: str, inner: int, bias: float, seed: int) -> None:
        super().__init__()
        layers, hidden, heads = model["num_hidden_layers"], model["hidden_size"], model["num_key_value_heads"]
        generator = torch.Generator().manual_seed(seed)
        self.activation = activation
        self.w1 = nn.Parameter(torch.randn(layers, inner, hidden, generator=generator) / hidden**0.5)
        self.b1 = nn.Parameter(torch.zeros(layers, inner))
        self.w2 = nn.Parameter(torch.randn(layers, heads, inner, generator=generator) * 0.02 / inner**0.5)
        self.b = nn.Parameter(torch.full((layers, heads), float(bias)))

    @classmethod
    def of(cls, config: Any, inner: int, bias: float, seed: int) -> Gates:
        """Gates for a transformers configuration.

        Raises:
            ConfigError: an activation that gates do not have.
        """
        if config.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"gates use the activation of the model's MLP, but '{config.hidden_act}' is not supported."
            )
        return cls(fingerprint(config), config.hidden_act, inner, bias, seed)

    def forward(self, layer: int, x: Tensor) -> Tensor:
        """`x` [B, T, D] -> log retention [B, H, T] fp32."""
        weights = (self.w1[layer], self.b1[layer], self.w2[layer], self.b[layer])
        return log_retention(x.float(), *weights, self.activation).transpose(1, 2)

    def export(self, config: Any, memory: int) -> TrimGates:
        """The gates as they are shipped, in bfloat16."""
        tensors = {k: v.detach().to("cpu", torch.bfloat16) for k, v in self.named_parameters()}
        return TrimGates(tensors, self.activation, memory, fingerprint(config))


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention with a bias a KV head: q [B, H, T, D], k and v [B, KVH, T, D], bias [B, KVH, T, T] -> [B, H, T, D].

    Written out: PyTorch's fused kernels have no reliable gradient of the bias on every GPU.
    """
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = grouped @ k.unsqueeze(2).transpose(-1, -2)
    weights = torch.softmax(scores.float() * scale + bias.unsqueeze(2), -1)
    return (weights.to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)


class GatedModel:
    """A frozen model with gates: `teacher` is the model as it is, `student` the gated one."""

    def __init__(self, model: Frozen, gates: Gates, memory: int) -> None:
        self.model, self.gates, self.memory = model, gates, memory
        self.capacity: list[Tensor] = []
        self.bias: Tensor | None = None

    def _gate(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.bias = gated_bias(self.gates(module.layer_idx, x))
        self.capacity.append(capacity_loss(self.bias, self.memory))

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        assert self.bias is not None
        return recompute(_attention, q, k, v, self.bias, scale, use_reentrant=False)

    @contextlib.contextmanager
    def _gated(self) -> Iterator[None]:
        self.capacity = []
        hooks = [
            layer.self_attn.register_forward_pre_hook(self._gate, with_kwargs=True) for layer in self.model.body.layers
        ]
        try:
            with watched(self._attend):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self.bias = None

    @torch.no_grad()
    def teacher(self, tokens: Tensor) -> Tensor:
        """Last hidden states [B, T, D] of the model with full attention."""
        return self.model.body(input_ids=tokens, use_cache=False).last_hidden_state

    def student(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden states [B, T, D] of the gated model, and the capacity loss averaged over layers and heads."""
        with self._gated():
            hidden = self.model.body(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden, torch.stack(self.capacity).mean()


def output_embedding(model: Frozen) -> Tensor:
    """[V, D] matrix that turns last hidden states into logits, in the model's dtype and on its device.

    Raises:
        ConfigError: it is neither tied to the input embedding nor in the model's files.
    """
    from safetensors import safe_open

    if getattr(model.body.config, "tie_word_embeddings", False):
        return model.body.get_input_embeddings().weight
    for path in sorted(Path(model.body.config.name_or_path).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if "lm_head.weight" in file.keys():  # noqa: SIM118 (not a mapping)
                return file.get_tensor("lm_head.weight").to(model.device, model.dtype)
    raise ConfigError(f"--model {model.name} has no lm_head.weight in safetensors; convert its weights to safetensors.")
