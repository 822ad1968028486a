"""What speculation plugins refuse before weights are loaded, and what they say of themselves at start."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ext.options import ConfigError
from vllm_ext.spec_decode import active
from vllm_ext.spec_decode.method import DrafterMethod, LengthMethod, SpecMethod, VerifierMethod

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _fail(text: str) -> None:
    raise ConfigError(text)


def check(method: SpecMethod, cfg: VllmConfig) -> None:
    """Raise ConfigError, one sentence with option and remedy, for whatever `method` cannot serve."""
    if cfg.speculative_config is None:
        _fail(
            f"--plugins {method.name} acts on drafts, and nothing drafts; add a drafter, e.g. "
            f"--plugins suffix_automaton,{method.name}."
        )
    if cfg.model_config.runner_type != "generate":
        _fail(f"--plugins {method.name} needs a generating model, which {cfg.model_config.model} is not.")
    runner = "v2" if cfg.use_v2_model_runner else "v1"
    if isinstance(method, DrafterMethod):
        _check_drafter(method, cfg, runner)
    if isinstance(method, VerifierMethod):
        _check_verifier(method, cfg, runner)
    if isinstance(method, LengthMethod) and cfg.parallel_config.data_parallel_size > 1:
        _fail(
            f"--plugins {method.name} does not support data parallelism: ranks could choose different lengths; run "
            "separate engines, or drop the plugin."
        )


def _check_drafter(method: DrafterMethod, cfg: VllmConfig, runner: str) -> None:
    if runner not in method.runners:
        _fail(
            f"--plugins {method.name} runs on model runner {' or '.join(method.runners)} only, and vLLM chose {runner} "
            "here; drop what keeps it from the other one, or take another drafter."
        )
    if type(method).lookup is not DrafterMethod.lookup and importlib.util.find_spec("numba") is None:
        _fail(f"--plugins {method.name} needs the package numba, which vLLM also lists; pip install numba.")
    wanted = method.speculative_config(runner)["method"]
    if cfg.speculative_config.method != wanted:
        _fail(
            f"--plugins {method.name} was set up for the other model runner (speculative method "
            f"{cfg.speculative_config.method}, needed {wanted}); set VLLM_USE_V2_MODEL_RUNNER={int(runner == 'v2')}."
        )
    masks = cfg.scheduler_config.max_num_seqs * (method.num_speculative_tokens - 1)
    parallel = method.name == "pard" or (getattr(method, "parallel", False) and getattr(method, "model", ""))
    if parallel and masks > cfg.scheduler_config.max_num_batched_tokens:
        _fail(
            f"{method.name}.num_speculative_tokens needs {masks} mask tokens a step, more than "
            f"--max-num-batched-tokens {cfg.scheduler_config.max_num_batched_tokens}; raise it or lower --max-num-seqs."
        )
    if cfg.parallel_config.decode_context_parallel_size > 1:
        _fail(f"--plugins {method.name} does not support decode context parallelism; set it to 1.")


def _check_verifier(method: VerifierMethod, cfg: VllmConfig, runner: str) -> None:
    spec = cfg.speculative_config
    if runner not in method.runners:
        _fail(f"--plugins {method.name} is not available on model runner {runner}; use {method.runners[0]}.")
    if spec.rejection_sample_method != "standard":
        _fail(
            f"--plugins {method.name} is a verification rule and so is rejection_sample_method="
            f"{spec.rejection_sample_method}; drop one of them."
        )
    if method.needs_draft_law and spec.draft_sample_method != "probabilistic":
        drafter = active.drafter(cfg)
        name = drafter.name if drafter else spec.method
        remedy = (
            f"set {name}.sampling to probabilistic"
            if hasattr(drafter, "sampling")
            else "use a drafter with probabilities, e.g. draft_model with sampling probabilistic"
        )
        _fail(f"--plugins {method.name} needs draft probabilities, which {name} does not give; {remedy}.")


def _config_json(name: str, model: str) -> dict[str, Any] | None:
    """config.json of a local directory; None if `model` is a name for vLLM to resolve."""
    from vllm_ext.plugin import check_model_directory

    try:
        check_model_directory(model)
    except ConfigError as error:
        raise ConfigError(f"{name}.model: {error}") from None
    path = Path(model).expanduser() / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def check_vocabulary(name: str, target: str, draft: str) -> None:
    """Refuse a draft model of another vocabulary size; models that are not local are left to vLLM's own check."""
    drafts = _config_json(name, draft)
    config = Path(target).expanduser() / "config.json"
    if drafts is None or not config.is_file():
        return
    wanted, found = json.loads(config.read_text(encoding="utf-8")).get("vocab_size"), drafts.get("vocab_size")
    if wanted and found and wanted != found:
        _fail(
            f"{name}.model '{draft}' has a vocabulary of {found} tokens, the target model one of {wanted}; use a draft "
            "model of the same family."
        )


def check_mask_token(name: str, draft: str) -> None:
    """Refuse a draft model without a mask token."""
    config = _config_json(name, draft)
    names = ("pard_token", "mask_token_id", "ptd_token_id")
    if config is not None and not any(config.get(n) is not None for n in names):
        _fail(
            f"{name}.model '{draft}' names no mask token (pard_token in config.json); adapt it with `vllm-ext train "
            "pard`, or draft sequentially with draft_model."
        )


def banner(method: SpecMethod, cfg: VllmConfig) -> dict[str, str]:
    """Lines of the start-up banner."""
    spec = cfg.speculative_config
    lines = {"runner": "V2" if cfg.use_v2_model_runner else "V1"}
    if isinstance(method, DrafterMethod):
        lines["drafts"] = f"up to {spec.num_speculative_tokens} tokens a request and step"
        lines["async scheduling"] = "on" if cfg.scheduler_config.async_scheduling else "off"
    if isinstance(method, VerifierMethod):
        lines["output law"] = "the target model's" if method.lossless else "LOSSY: differs from the target model's"
    return lines
