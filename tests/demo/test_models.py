"""The SmolLM2 directory and its cache, the GGUF conversion, and the random tiny models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vllm_ext import gguf_convert, models
from vllm_ext.options import ConfigError


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A cache in tmp_path, a "GGUF" of a few bytes instead of the download, and a conversion that writes two files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = {"downloads": 0, "conversions": 0}

    def download(into):
        calls["downloads"] += 1
        path = into / models.GGUF_NAME
        path.write_bytes(b"weights")
        return path

    def convert(source, out, dtype, on_tensor):
        calls["conversions"] += 1
        (out / "model.safetensors").write_bytes(source.read_bytes() + dtype.encode())
        (out / "config.json").write_text("{}")
        on_tensor(1.0)

    monkeypatch.setattr(models, "_download", download)
    monkeypatch.setattr(models, "convert", convert)
    probe = tmp_path / "probe"
    probe.write_bytes(b"weights")
    monkeypatch.setattr(models, "GGUF_SHA256", models.sha256(probe))
    return calls


def test_cache_follows_xdg_and_ignores_relative_values(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert models.cache_dir() == tmp_path / "x" / "vllm-ext"
    for value in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert models.cache_dir() == tmp_path / ".cache" / "vllm-ext"


def test_second_call_neither_downloads_nor_converts(fake):
    first = models.smollm2()
    assert models.smollm2() == first
    assert fake == {"downloads": 1, "conversions": 1}
    assert models.smollm2(dtype="float32") != first
    assert fake == {"downloads": 1, "conversions": 2}


@pytest.mark.parametrize("harm", ["change", "remove", "manifest", "truncate"])
def test_damaged_directory_is_built_again_with_a_sentence(fake, caplog, harm):
    folder = models.smollm2()
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    if harm == "change":
        weights.write_bytes(b"x" + good[1:])
    elif harm == "remove":
        weights.unlink()
    elif harm == "truncate":
        weights.write_bytes(good[:-1])
    else:
        (folder / models.MANIFEST).write_text("[1")
    assert models.smollm2() == folder
    assert weights.read_bytes() == good
    assert "is built again" in caplog.text
    assert models.damage(folder, "bfloat16") is None
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_damaged_download_is_fetched_again(fake, caplog):
    models.smollm2()
    (models.cache_dir() / "downloads" / models.GGUF_NAME).write_bytes(b"cut off")
    models.smollm2(dtype="float32")
    assert fake["downloads"] == 2
    assert "downloaded again" in caplog.text


def test_interrupted_conversion_leaves_nothing_behind(fake, monkeypatch):
    def fails(source, out, dtype, on_tensor):
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "convert", fails)
    with pytest.raises(KeyboardInterrupt):
        models.smollm2()
    assert list((models.cache_dir() / "models").iterdir()) == []


def test_out_is_made_and_a_foreign_directory_is_left_alone(fake, tmp_path):
    out = tmp_path / "mine"
    assert models.smollm2(out) == out
    with pytest.raises(ConfigError, match="--out"):
        models.smollm2(out / "config.json")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="choose another directory"):
        models.smollm2(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert models.damage(models.smollm2(tmp_path / "empty"), "bfloat16") is None


def test_given_gguf_is_used_and_checked(fake, tmp_path):
    (tmp_path / "good.gguf").write_bytes(b"weights")
    models.smollm2(gguf=tmp_path / "good.gguf")
    assert fake["downloads"] == 0
    (tmp_path / "bad.gguf").write_bytes(b"other")
    with pytest.raises(ConfigError, match="is not a file"):
        models.smollm2(gguf=tmp_path / "none.gguf")
    for path, words in ((tmp_path / "bad.gguf", "sha256"), (tmp_path / "none.gguf", "is not a file")):
        with pytest.raises(ConfigError, match=words):
            models.smollm2(tmp_path / "out", gguf=path)
    assert not (tmp_path / "out").exists()


def test_unknown_dtype_is_refused(fake):
    with pytest.raises(ConfigError, match="--dtype must be one of"):
        models.smollm2(dtype="int4")


HIDDEN, HEADS, KV_HEADS, DIM, INNER = 16, 4, 2, 4, 24
TOKENS = ["<|end|>", "<|im|>", *(chr(c) for c in range(33, 127)), "Ġ", "th", "Ġth"]
SHAPES = {
    "token_embd": (len(TOKENS), HIDDEN),
    "output_norm": (HIDDEN,),
    "blk.0.attn_norm": (HIDDEN,),
    "blk.0.attn_q": (HEADS * DIM, HIDDEN),
    "blk.0.attn_k": (KV_HEADS * DIM, HIDDEN),
    "blk.0.attn_v": (KV_HEADS * DIM, HIDDEN),
    "blk.0.attn_output": (HIDDEN, HEADS * DIM),
    "blk.0.ffn_norm": (HIDDEN,),
    "blk.0.ffn_gate": (INNER, HIDDEN),
    "blk.0.ffn_up": (INNER, HIDDEN),
    "blk.0.ffn_down": (HIDDEN, INNER),
}


def side_by_side(weight, heads):
    """Rows of a q or k projection as llama.cpp stores them: the two rotary halves of a head interleaved."""
    halves = weight.reshape(heads, 2, DIM // 2, HIDDEN)
    return np.ascontiguousarray(halves.transpose(0, 2, 1, 3)).reshape(weight.shape)


def add_keys(writer):
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_add_bos_token(False)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["t h", "Ġ th"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def write_gguf(path, *, arch="llama"):
    """Write a Llama of one layer in llama.cpp's layout; returns its weights in Hugging Face's."""
    from gguf import GGUFWriter

    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    writer = GGUFWriter(path, arch)
    add_keys(writer)
    heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", side_by_side(weight, heads[name]) if name in heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_conversion_of_a_small_gguf(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = write_gguf(tmp_path / "m.gguf")
    out = tmp_path / "hf"
    out.mkdir()
    gguf_convert.convert(tmp_path / "m.gguf", out, "float32")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    state = model.state_dict()
    for name, weight in weights.items():
        assert torch.equal(state[gguf_convert.target_name(f"{name}.weight")], torch.from_numpy(weight)), name
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("a th12<|im|>") == ["a", "Ġth", "1", "2", "<|im|>"]
    assert tokenizer.decode(tokenizer("a th12")["input_ids"]) == "a th12"
    assert tokenizer.eos_token_id == 1
    assert tokenizer.chat_template


def test_other_files_are_refused_with_a_sentence(tmp_path):
    write_gguf(tmp_path / "m.gguf", arch="qwen2")
    (tmp_path / "junk.gguf").write_bytes(b"not a model")
    for name, words in (("m.gguf", "general.architecture = 'qwen2'"), ("junk.gguf", "cannot be read as a GGUF")):
        with pytest.raises(ConfigError, match=words):
            gguf_convert.convert(tmp_path / name, tmp_path, "float32")
    with pytest.raises(ConfigError, match="not converted"):
        gguf_convert.target_name("blk.0.attn_q_norm.weight")


def test_smollm2_answers_in_transformers():
    """The real weights, in fp32: the one test of this file that may download (93 MB, once)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.smollm2(dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


def test_tiny_llama_is_a_function_of_its_arguments(tmp_path):
    shape = {"layers": 2, "heads": 6, "kv_heads": 3, "head_dim": 32, "hidden": 48, "vocab": 97, "max_positions": 256}
    one, two = (models.tiny_llama(tmp_path / n, **shape) for n in ("a", "b"))
    other = models.tiny_llama(tmp_path / "c", **shape, seed=1)
    blobs = [(p / "model.safetensors").read_bytes() for p in (one, two, other)]
    assert blobs[0] == blobs[1] != blobs[2]


@pytest.mark.parametrize("window", [None, 64])
def test_tiny_llama_loads_in_transformers(tmp_path, window):
    from transformers import AutoModelForCausalLM

    out = models.tiny_llama(tmp_path, layers=2, heads=6, kv_heads=3, head_dim=32, vocab=97, sliding_window=window)
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert json.loads((out / "config.json").read_text())["num_key_value_heads"] == 3
    logits = model(torch.arange(90)[None]).logits
    assert logits.isfinite().all()
    # greedy tokens depend on the context: a constant output would hide errors of attention
    assert len(set(logits[0].argmax(-1).tolist())) > 20
    assert type(model).__name__ == ("LlamaForCausalLM" if window is None else "MistralForCausalLM")
