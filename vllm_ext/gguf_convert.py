"""A Llama model in a GGUF file as a Hugging Face directory.

Only what SmolLM2 needs: architecture `llama`, byte-level BPE (`gpt2`) with the `smollm` split, tied embeddings. Every
size, constant, token and the chat template come from the file; anything else is refused rather than guessed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ext.options import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer

DTYPES = ("bfloat16", "float16", "float32")
SPECIAL = 3  # tokenizer.ggml.token_type of control tokens

LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MODEL_PARTS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


class GgufFile:
    """Key-value pairs and dequantized tensors of one GGUF file."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ConfigError("reading a GGUF file needs the package gguf: install vllm-ext[bench].") from None
        try:
            self._reader = GGUFReader(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a GGUF file: {error}") from None
        self._tensors = {str(t.name): t for t in self._reader.tensors}
        self.names = tuple(self._tensors)

    def value(self, key: str) -> Any:
        """The value under `key`; raises ConfigError if the file has none."""
        field = self._reader.fields.get(key)
        if field is None:
            raise ConfigError(f"the GGUF file has no '{key}'; only SmolLM2-like Llama files are converted.")
        return field.contents()

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32, in row-major (output, input) order."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        return dequantize(tensor.data, tensor.tensor_type)


def shortest_float(value: float) -> float:
    """A constant such as 1e-5 as it was written before it was stored in single precision."""
    return float(f"{value:.6g}")


def check_supported(gguf: GgufFile) -> None:
    """Raise ConfigError unless the file is a Llama with tied embeddings and SmolLM's tokenizer."""
    wanted = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
    }
    for key, expected in wanted.items():
        if (found := gguf.value(key)) != expected:
            raise ConfigError(f"the GGUF file has {key} = {found!r}; only {expected!r} is converted.")
    if "output.weight" in gguf.names or "rope_freqs.weight" in gguf.names:
        raise ConfigError("the GGUF file has an untied output head or scaled rotary frequencies; neither is converted.")


def model_config(gguf: GgufFile, dtype: str) -> dict[str, Any]:
    """The contents of config.json."""
    heads, hidden = gguf.value("llama.attention.head_count"), gguf.value("llama.embedding_length")
    theta = shortest_float(gguf.value("llama.rope.freq_base"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": gguf.value("llama.feed_forward_length"),
        "num_hidden_layers": gguf.value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.value("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_position_embeddings": gguf.value("llama.context_length"),
        "rms_norm_eps": shortest_float(gguf.value("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "vocab_size": len(gguf.value("tokenizer.ggml.tokens")),
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": gguf.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": gguf.value("tokenizer.ggml.padding_token_id"),
        "torch_dtype": dtype,
        "transformers_version": "5.0.0",
    }


def target_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; raises ConfigError for one that a Llama does not have."""
    stem, _, kind = name.rpartition(".")
    if stem in MODEL_PARTS:
        return f"{MODEL_PARTS[stem]}.{kind}"
    block, _, part = stem.rpartition(".")
    if block.startswith("blk.") and part in LAYER_PARTS:
        return f"model.layers.{block.removeprefix('blk.')}.{LAYER_PARTS[part]}.{kind}"
    raise ConfigError(f"the GGUF file has a tensor '{name}' that is not converted.")


def split_rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from GGUF's order (rotary pairs adjacent) to two halves per head."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(0, 2, 1, 3).reshape(rows, columns)


def model_weights(
    gguf: GgufFile, config: dict[str, Any], on_tensor: Callable[[float], None] = lambda fraction: None
) -> dict[str, torch.Tensor]:
    """All weights under their Hugging Face names, in the dtype of `config`."""
    import numpy as np
    import torch

    dtype = getattr(torch, config["torch_dtype"])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for done, name in enumerate(gguf.names, start=1):
        array = gguf.tensor(name)
        part = name.split(".")[-2]
        if part in heads:
            array = split_rotary_halves(array, heads[part])
        weights[target_name(name)] = torch.from_numpy(np.array(array, dtype=np.float32)).to(dtype)
        on_tensor(done / len(gguf.names))
    return weights


def build_tokenizer(gguf: GgufFile) -> Tokenizer:
    """Byte-level BPE that splits digits one by one, with the file's control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = gguf.value("tokenizer.ggml.tokens")
    kinds: list[int] = gguf.value("tokenizer.ggml.token_type")
    merges = [tuple(rule.split(" ", 1)) for rule in gguf.value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds) if kind == SPECIAL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    if tokenizer.get_vocab_size() != len(tokens):
        raise ConfigError("the GGUF file's control tokens are not part of its vocabulary; it is not converted.")
    return tokenizer


def tokenizer_config(gguf: GgufFile) -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    tokens = gguf.value("tokenizer.ggml.tokens")
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": gguf.value("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        **{role: tokens[gguf.value(f"tokenizer.ggml.{key}_token_id")] for role, key in roles.items()},
        "chat_template": gguf.value("tokenizer.chat_template"),
    }


def convert(source: Path, out: Path, dtype: str, on_tensor: Callable[[float], None] = lambda fraction: None) -> None:
    """Write the model of the GGUF file `source` into the existing folder `out`.

    Args:
        source: a GGUF file (see the module's text for what is taken).
        out: folder for config.json, model.safetensors, tokenizer.json and their neighbours.
        dtype: one of `DTYPES`, the dtype of the weights written.
        on_tensor: called with the fraction of tensors done.

    Raises:
        ConfigError: another kind of file, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got '{dtype}'.")
    from safetensors.torch import save_file

    gguf = GgufFile(source)
    check_supported(gguf)
    config = model_config(gguf, dtype)
    save_file(model_weights(gguf, config, on_tensor), out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(out / "generation_config.json", ids)
    build_tokenizer(gguf).save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", tokenizer_config(gguf))
    (out / "chat_template.jinja").write_text(gguf.value("tokenizer.chat_template"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n")
