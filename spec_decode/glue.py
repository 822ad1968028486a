"""Where speculation enters vLLM's workers. Each rebound name passes through where no plugin of its part is selected."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm_ext.spec_decode import active

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def attach(vllm_config: VllmConfig) -> None:
    """Rebind what this engine's model runner needs, in a worker process before the runner is made; idempotent."""
    if vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu import model_runner

        _once(model_runner, "init_speculator", _speculators)
        _once(model_runner, "RejectionSampler", _samplers)
        _once(model_runner.GPUModelRunner, "add_requests", _after_add)
        _once(model_runner.GPUModelRunner, "finish_requests", _after_finish)
    else:
        from vllm.platforms import current_platform
        from vllm.v1.sample import rejection_sampler
        from vllm.v1.worker import gpu_model_runner

        if current_platform.is_cpu():
            _once(rejection_sampler, "expand_batch_to_tokens", _expand_on_cpu)
        _once(gpu_model_runner.GPUModelRunner, "__init__", _v1_sampler)
        _once(gpu_model_runner.GPUModelRunner, "propose_draft_token_ids", _before_propose)


def _once(owner: Any, name: str, wrap: Any) -> None:
    original = getattr(owner, name)
    if not hasattr(original, "vllm_ext"):
        wrapped = wrap(original)
        wrapped.vllm_ext = True
        setattr(owner, name, wrapped)


def _speculators(original: Any) -> Any:
    @functools.wraps(original)
    def init_speculator(vllm_config: VllmConfig, device: Any, req_states: Any) -> Any:
        drafter = active.drafter(vllm_config)
        if drafter is None:
            return original(vllm_config, device, req_states)
        return drafter.speculator(vllm_config, device, req_states)

    return init_speculator


def _samplers(original: Any) -> Any:
    @functools.wraps(original, updated=())
    def make(sampler: Any, spec_config: Any, device: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config

        method = active.verifier(get_current_vllm_config())
        if method is None:
            return original(sampler, spec_config, device, **kwargs)
        from vllm_ext.spec_decode.verify_v2 import RuleSampler

        return RuleSampler(method, sampler, spec_config, device, **kwargs)

    return make


def _after_add(original: Any) -> Any:
    @functools.wraps(original)
    def add_requests(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        rows = getattr(self.speculator, "rows", None)
        if rows is not None:
            for request in scheduler_output.scheduled_new_reqs:
                rows.add(request)

    return add_requests


def _after_finish(original: Any) -> Any:
    @functools.wraps(original)
    def finish_requests(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        rows = getattr(self.speculator, "rows", None)
        if rows is not None:
            for request in sorted(scheduler_output.finished_req_ids):
                rows.drafter.remove(request)
            for request in sorted(scheduler_output.preempted_req_ids or ()):
                rows.drafter.remove(request, finished=False)

    return finish_requests


def _expand_on_cpu(original: Any) -> Any:
    """vLLM 0.32's CPU version fills a copy: temperatures, top-k and top-p of drafts would be uninitialized memory."""
    import torch

    @functools.wraps(original)
    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return torch.where(x == replace_from, replace_to, x).repeat_interleave(counts, output_size=num_tokens)

    return expand_batch_to_tokens


def _v1_sampler(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        method = active.verifier(vllm_config)
        if method is not None and hasattr(self, "rejection_sampler"):
            from vllm_ext.spec_decode.verify_v1 import RuleSampler

            self.rejection_sampler = RuleSampler(method, self.sampler, vllm_config.speculative_config, self.device)

    return __init__


def _before_propose(original: Any) -> Any:
    @functools.wraps(original)
    def propose_draft_token_ids(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        begin = getattr(self.drafter, "begin_step", None)
        if begin is not None:
            begin(self, scheduler_output)
        return original(self, scheduler_output, *args, **kwargs)

    return propose_draft_token_ids
