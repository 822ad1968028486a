"""RESA: a host's pages exactly, the other keys from a prior of the prompt (OpenReview ktcq26hMCH, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_ext.attention_backends.hosted import HostedMethod
from vllm_ext.options import ConfigError, option

if TYPE_CHECKING:
    from vllm_ext.attention_backends.stages import StageDims, Stages


@dataclass(frozen=True)
class Resa(HostedMethod):
    """The prompt's mean query sees every key once, at the end of each prompt chunk; a decode step subtracts from that
    what it reads exactly and weighs the rest by `lambda_`, in fp32 and merged by log-sum-exp.

    Pages that fill up while tokens are generated join the prior (the paper leaves appended tokens open). On a prefix
    hit the mean is that of the queries computed now: answers can then differ from the first run's. A request with fewer
    than `min_queries` of them, or beyond `slots` running requests, is served by the host alone.

    By head and step the prior counts in proportion to the variance of the read logits that it explains, and is dropped
    below `gate` of it (not in the paper; null for the paper's form).
    """

    name: ClassVar[str] = "resa"
    paper_values: ClassVar[Mapping[str, Any]] = {"budget": "2.5 % of 8K"}

    lambda_: float = option(1.0, "weight of the estimate; 0 = the host alone", minimum=0, maximum=1, paper="by task")
    gate: float | None = option(
        0.0, "least share of the read logits' variance that the prior explains; null = count it wholly", maximum=1
    )
    slots: int = option(64, "requests that can hold a prior at a time", unit="requests", minimum=1)
    min_queries: int = option(64, "computed prompt queries that a prior needs", unit="tokens", minimum=1)

    def stages(self, dims: StageDims) -> Stages:
        """Host's list, attention over it with the prior."""
        from vllm_ext.attention_backends.resa_stages import ResaStages

        return ResaStages(self, dims)

    def check(self, vllm_config: Any) -> None:
        """What the host refuses, and query tiles that leave no shared memory for the prior's."""
        from vllm.platforms import current_platform

        super().check(vllm_config)
        model, spec = vllm_config.model_config, vllm_config.speculative_config
        heads = model.get_num_attention_heads(vllm_config.parallel_config)
        drafts = (spec.num_speculative_tokens or 0) if spec is not None else 0
        rows = (1 + drafts) * heads // model.get_num_kv_heads(vllm_config.parallel_config)
        if not current_platform.is_cpu() and model.get_head_size() > 128 and rows > 64:
            raise ConfigError(
                f"--plugins resa takes up to 64 query rows a KV head for heads of {model.get_head_size()}, not {rows}; "
                "lower num_speculative_tokens."
            )

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """Rows of the engine, and the prior's memory."""
        from vllm_ext.attention_backends.limits import sparse_layer_count

        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        heads, kv = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel)
        size = model.get_head_size()
        layer = self.slots * (10 * heads * size + 4 * heads + 4 * kv * size)
        total = sparse_layer_count(self, vllm_config) * layer
        return super().banner(vllm_config) | {"prior": f"{self.slots} requests, {total / 2**20:.0f} MiB a GPU"}
