"""Options and combinations of speculation plugins: what they expand to, and what is refused with one sentence."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from vllm_ext import config
from vllm_ext.options import ConfigError
from vllm_ext.spec_decode import carrier
from vllm_ext.spec_decode.limits import check


@pytest.fixture(params=["v1", "v2"])
def runner(request, monkeypatch) -> str:
    """Either model runner."""
    monkeypatch.setattr(carrier, "runner", lambda: request.param)
    return request.param


def model_dir(tmp_path, name: str, **values) -> str:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 100} | values))
    return str(folder)


def test_expansion(runner):
    args = config.expand(["suffix_automaton"], {"suffix_automaton": {"num_speculative_tokens": 6}}).engine_args
    spec = args["speculative_config"]
    assert spec["num_speculative_tokens"] == 6
    assert spec["method"] == {"v1": "custom_class", "v2": "ngram_gpu"}[runner]
    assert "scheduler_cls" not in args


@pytest.mark.parametrize("name", ["draft_model", "pard"])
def test_model_drafters_are_counted_by_the_scheduler(runner, name):
    args = config.expand([name], {name: {"model": "x"}}).engine_args
    assert args["scheduler_cls"].endswith("SpeculationScheduler")


def test_drafter_and_length_policy_share_a_speculative_config(runner):
    given = {"suffix_automaton": {"num_speculative_tokens": 6}, "fixed": {"lengths": [0, 3, 6], "drafts": 3}}
    args = config.expand(["suffix_automaton", "fixed"], given).engine_args
    assert args["speculative_config"]["num_speculative_tokens"] == 6
    tiers = args["speculative_config"]["num_speculative_tokens_per_batch_size"]
    assert [k for _, _, k in tiers] == [6, 3, 0]
    assert args["scheduler_cls"].endswith("SpeculationScheduler")


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("suffix_automaton", {"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ("suffix_automaton", {"num_speculative_tokens": 33}, "num_speculative_tokens"),
        ("suffix_automaton", {"occurrence": "best"}, "occurrence"),
        ("ngram", {"ngram": 0}, "ngram.ngram"),
        ("pard", {"model": "x", "sampling": "hot"}, "pard.sampling"),
        ("hedge_spec", {"drafters": ["longest"]}, "at least two"),
        ("hedge_spec", {"drafters": ["longest", "shard"]}, "did you mean 'shared'"),
        ("hedge_spec", {"drafters": ["ngram", "ngram"]}, "each once"),
    ],
)
def test_wrong_options(name, options, word):
    with pytest.raises(ConfigError, match=word):
        config.expand([name], {name: options})


def test_defaults_go_with_sparse_attention(runner):
    """Drafts and the verified token fit the query rows of the attention kernels, length policies what is drafted."""
    from vllm_ext import catalogue
    from vllm_ext.attention_backends.support import MAX_QUERY_TOKENS
    from vllm_ext.spec_decode.method import DrafterMethod, LengthMethod

    plugins = [config.expand([name], {}).plugins[name] for name in catalogue.load()]
    most = {p.name: p.num_speculative_tokens for p in plugins if isinstance(p, DrafterMethod)}
    assert len(most) >= 6
    assert set(most.values()) == {MAX_QUERY_TOKENS - 1}
    lengths = [max(p.lengths) for p in plugins if isinstance(p, LengthMethod)]
    assert lengths == [MAX_QUERY_TOKENS - 1] * 2
    config.expand(["quest", "suffix_automaton", "fixed"], {})


def test_one_drafter_at_a_time():
    with pytest.raises(ConfigError, match="exclude each other"):
        config.expand(["suffix_automaton", "ngram"], {})


def test_draft_models_of_another_kind(tmp_path):
    """Vocabulary, missing directory and missing mask token, before anything is loaded."""
    target = model_dir(tmp_path, "target")
    other, plain = model_dir(tmp_path, "other", vocab_size=99), model_dir(tmp_path, "plain")
    masked = model_dir(tmp_path, "masked", pard_token=3)
    engine_args = SimpleNamespace(model=target)

    def early(name: str, model: str) -> None:
        config.expand([name], {name: {"model": model}}).plugins[name].early(engine_args)

    with pytest.raises(ConfigError, match="99 tokens, the target model one of 100"):
        early("draft_model", other)
    with pytest.raises(ConfigError, match="model is empty"):
        early("draft_model", "")
    with pytest.raises(ConfigError, match="does not exist"):
        early("draft_model", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="train pard"):
        early("pard", plain)
    early("pard", masked)
    early("draft_model", plain)


def engine(**values) -> SimpleNamespace:
    """As much of a VllmConfig as the checks read."""
    spec = {"method": "ngram_gpu", "num_speculative_tokens": 8, "draft_sample_method": "greedy"}
    spec |= {"rejection_sample_method": "standard"} | values.pop("spec", {})
    base = {
        "speculative_config": SimpleNamespace(**spec),
        "model_config": SimpleNamespace(runner_type="generate", model="m"),
        "use_v2_model_runner": True,
        "scheduler_config": SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64),
        "parallel_config": SimpleNamespace(decode_context_parallel_size=1, data_parallel_size=2),
        "additional_config": {},
    }
    return SimpleNamespace(**(base | values))


@pytest.mark.parametrize(
    ("name", "options", "cfg", "word"),
    [
        ("hsd", {}, engine(speculative_config=None), "add a drafter"),
        ("suffix_automaton", {}, engine(use_v2_model_runner=False), "VLLM_USE_V2_MODEL_RUNNER=0"),
        ("hybrid", {"model": "m"}, engine(use_v2_model_runner=False), "runs on model runner v2 only"),
        (
            "pard",
            {"model": "m", "num_speculative_tokens": 16},
            engine(spec={"method": "draft_model"}),
            "120 mask tokens",
        ),
        (
            "hedge_spec",
            {"model": "m", "parallel": True, "num_speculative_tokens": 16},
            engine(spec={"method": "draft_model"}),
            "120 mask tokens",
        ),
        ("hsd", {}, engine(spec={"rejection_sample_method": "block"}), "drop one"),
        ("fixed", {}, engine(), "data parallelism"),
    ],
    ids=["no drafter", "other runner", "V2 only", "too many masks", "masks of a hedge", "two rules", "data parallel"],
)
def test_refused_engines(name, options, cfg, word):
    plugin = config.expand([name], {name: options}).plugins[name]
    with pytest.raises(ConfigError, match=word):
        check(plugin, cfg)


def test_sequential_drafts_need_no_mask_tokens():
    options = {"model": "m", "num_speculative_tokens": 16}
    hybrid = config.expand(["hybrid"], {"hybrid": options}).plugins["hybrid"]
    sequential, parallel = (dataclasses.replace(hybrid, parallel=p) for p in (False, True))
    check(sequential, engine(spec={"method": "draft_model"}))
    with pytest.raises(ConfigError, match=r"hybrid\.num_speculative_tokens needs 120 mask"):
        check(parallel, engine(spec={"method": "draft_model"}))


def test_draft_models_of_a_hedge(tmp_path, runner):
    """The sentence names the hedge's own option."""
    target, plain = model_dir(tmp_path, "target"), model_dir(tmp_path, "plain")
    given = {"hedge_spec": {"model": plain, "parallel": True}}
    hedge = config.expand(["hedge_spec"], given).plugins["hedge_spec"]
    with pytest.raises(ConfigError, match="V1" if runner == "v1" else r"hedge_spec\.model .* names no mask token"):
        hedge.early(SimpleNamespace(model=target))
