"""InfLLM-V2: dense up to a length, then the blocks whose mean-key windows weigh most (arXiv 2509.24663, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_ext.attention_backends.method import SparseMethod
from vllm_ext.options import option

if TYPE_CHECKING:
    from vllm_ext.attention_backends.stages import StageDims, Stages


@dataclass(frozen=True)
class InfLLMV2(SparseMethod):
    """Two levels of mean keys choose the blocks of a decode step; prefill stays dense.

    Windows of 32 keys at every 16 are scored for all heads of a GQA group together: the sum of their softmax weights,
    normalised by the log-sum-exp over windows of 128 keys at every 64. A block takes its best overlapping window. The
    first block and the last 33 are always read, as in the released configuration of MiniCPM4 (init_blocks 1,
    window_size 2048, and topk 64 of at most 96 listed blocks); `dense_below` is its dense_len.

    The paper tunes the model for this attention. On other models it is a training-free selector by pooled keys. The
    paper also prefills sparsely; here, as in its dense mode, prompts are exact.
    """

    name: ClassVar[str] = "infllm_v2"
    paper_values: ClassVar[Mapping[str, Any]] = {}

    budget: int = option(6144, "keys read per query and KV head in a sparse step", unit="tokens", minimum=16)
    page_size: int = option(
        64, "tokens a block (= vLLM block size); windows scale with it", unit="tokens", choices=(32, 64, 128)
    )
    dense_layers: tuple[int, ...] = option([], "layers that stay dense")
    dense_below: int | None = option(
        8192, "requests up to this length are exact; null = twice the budget", unit="tokens", minimum=0
    )
    sink: int = option(1, "blocks at the start that are always read", unit="pages", minimum=0)
    local: int = option(33, "blocks at the end that are always read", unit="pages", minimum=1)

    def record_elements(self, head_size: int) -> int:
        """Four fine means and a coarse one."""
        return 5 * head_size

    def stages(self, dims: StageDims) -> Stages:
        """Window scores instead of the one-launch selection."""
        from vllm_ext.attention_backends.window_stages import WindowStages

        return WindowStages(self, dims)
