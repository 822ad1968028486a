"""ThinKV: older thoughts shrink step by step, unimportant ones first (ICLR 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_ext.kv_managers import think_thresholds
from vllm_ext.kv_managers.method import KVMethod, Trigger
from vllm_ext.options import ConfigError, option

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_ext.kv_managers.think_thresholds import Thoughts
    from vllm_ext.kv_managers.view import KVView


@dataclass(frozen=True)
class ThinkKV(KVMethod):
    """Segments of `stride` tokens shrink by `schedule`; of a segment, medoids of its keys stay.

    A segment's type follows from how sparse the attention of its last queries was in the layers of `thoughts`:
    transition, execution or reasoning, in order of importance. A segment is typed when it ends and the type acts one
    segment later. Thresholds differ from model to model, so there are none by default: without a file every segment
    is a reasoning and the oldest shrink first. So are the prompt and what ended before the first eviction.

    Two deviations. How many tokens stay must not depend on the text: the schedule decides which segments pay, and is
    cut or eased to the `budget` exactly. And tokens are evicted, not quantized: all keys keep the cache's one dtype.
    """

    name: ClassVar[str] = "think_kv"
    trigger: ClassVar[Trigger] = "decode"
    needs_positions: ClassVar[bool] = True
    paper_values: ClassVar[Mapping[str, Any]] = {"sinks": 0, "window": 128}

    budget: int | None = option(1024, "tokens kept per KV head", unit="tokens", minimum=16)
    stride: int = option(128, "tokens of a segment, and between evictions", unit="tokens", minimum=16)
    schedule: tuple[int, ...] = option([64, 32, 16, 8, 4], "sizes of a segment, step by step", unit="tokens", minimum=1)
    thoughts: str = option(
        "", 'file of `vllm-ext train thoughts`: layers and thresholds that tell thoughts apart; "" = all are reasoning'
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = list(self.schedule)
        if sizes != sorted(set(sizes), reverse=True) or not sizes or sizes[0] > self.stride:
            raise ConfigError(f"think_kv.schedule must fall from at most think_kv.stride ({self.stride}), got {sizes}.")

    def load_thoughts(self) -> Thoughts | None:
        """Layers and thresholds, if a file is given.

        Raises:
            ConfigError: no such file, or a damaged one.
        """
        return think_thresholds.load(self.thoughts) if self.thoughts else None

    def check(self, vllm_config: Any) -> None:
        found = self.load_thoughts()
        if found is not None:
            found.check_model(vllm_config.model_config.hf_text_config)
            if vllm_config.parallel_config.tensor_parallel_size > 1:
                raise ConfigError("think_kv.thoughts reads all heads; set --tensor-parallel-size 1 or drop the file.")
        super().check(vllm_config)

    def banner(self, vllm_config: Any) -> dict[str, str]:
        found = self.load_thoughts()
        text = "not told apart; the oldest segments shrink first"
        if found is not None:
            text = f"by layers {', '.join(map(str, found.layers))}, sparsity {found.low:g} and {found.high:g}"
        return super().banner(vllm_config) | {"thoughts": text}

    def score(self, view: KVView) -> Tensor:
        from vllm_ext.kv_managers import think_plan

        types = self._types(view)
        return think_plan.scores(view, types, self.stride, self.schedule, self.sinks)

    def _types(self, view: KVView) -> dict[int, int]:
        """Segment -> type, for those typed at earlier evictions; notes the sparsity of the segment that ended now."""
        from vllm_ext.kernels import kv_score_think as formula
        from vllm_ext.kv_managers import think_plan

        told = self.load_thoughts()
        if told is None or view.seen <= view.prompt:
            return {}
        noted = view.state.setdefault("sparsity", {})
        now = (view.seen - 1) // self.stride
        types = {
            s: formula.thought(float(sum(values) / len(values)), told.low, told.high)
            for s, values in noted.items()
            if s < now and s * self.stride >= view.prompt
        }
        wanted = [i for i, layer in enumerate(view.layers) if layer in told.layers]
        if wanted:
            noted.setdefault(now, []).extend(think_plan.sparsity(view, wanted))
        return types
