"""ThinKV: older thoughts shrink step by step, unimportant ones first (ICLR 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_ext.kv_managers.method import KVMethod, Trigger
from vllm_ext.options import ConfigError, option

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_ext.kv_managers.view import KVView


@dataclass(frozen=True)
class ThinkKV(KVMethod):
    """Segments of `stride` tokens shrink by `schedule`; of a segment, medoids of its keys stay.

    A segment's type follows from how sparse the attention of its last queries was in `type_layers`: transition,
    execution or reasoning, in order of importance. A segment is typed when it ends and the type acts one segment later.
    The prompt counts as reasoning, and so does every segment where no `type_layers` are given.

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
    type_layers: tuple[int, ...] = option([], "layers whose sparsity tells the type of a thought")
    low: float = option(0.5, "sparsity below which a thought is an execution", minimum=0, maximum=1)
    high: float = option(0.8, "sparsity from which a thought is a transition", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = list(self.schedule)
        if sizes != sorted(set(sizes), reverse=True) or not sizes or sizes[0] > self.stride:
            raise ConfigError(f"think_kv.schedule must fall from at most think_kv.stride ({self.stride}), got {sizes}.")
        if self.low > self.high:
            raise ConfigError(f"think_kv.low ({self.low}) must not exceed think_kv.high ({self.high}); lower it.")

    def score(self, view: KVView) -> Tensor:
        from vllm_ext.kv_managers import think_plan

        types = self._types(view)
        return think_plan.scores(view, types, self.stride, self.schedule, self.sinks)

    def _types(self, view: KVView) -> dict[int, int]:
        """Segment -> type, for those typed at earlier evictions; notes the sparsity of the segment that ended now."""
        from vllm_ext.kernels import kv_score_think as formula
        from vllm_ext.kv_managers import think_plan

        noted = view.state.setdefault("sparsity", {})
        now = (view.seen - 1) // self.stride
        types = {
            s: formula.thought(float(sum(values) / len(values)), self.low, self.high)
            for s, values in noted.items()
            if s < now and s * self.stride >= view.prompt
        }
        wanted = [i for i, layer in enumerate(view.layers) if layer in self.type_layers]
        if wanted and view.seen > view.prompt:
            noted.setdefault(now, []).extend(think_plan.sparsity(view, wanted))
        return types
