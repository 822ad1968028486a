"""What a KV-cache eviction method declares: its options, when it evicts, how many tokens stay, and how tokens score.

A method is a frozen dataclass: the fields are the options of the command line, `trigger` says when tokens are evicted,
`budget_for` how many stay, `score` which. The engine does the rest (`counts.py`, `spec.py`, `compactor.py`). No torch
or vLLM import here: the classes are read while vLLM's command line is being built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vllm_ext.options import ConfigError, option

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_ext.kv_managers.view import KVView

BACKEND_NAME = "VLLM_EXT_KV"
"""The name under which the backend of all KV-cache managers is registered with vLLM."""

Trigger = Literal["prefill_end", "decode", "streaming"]
"""When tokens are evicted.

prefill_end: once, after the prompt. decode: after the prompt and then every `stride` tokens.
streaming: every `stride` tokens, inside the prompt too, so that a prompt is never resident as a whole.
"""


@dataclass(frozen=True)
class KVMethod:
    """Options and slots shared by every method that evicts tokens and frees their blocks."""

    kind: ClassVar[str] = "kv"
    trigger: ClassVar[Trigger] = "prefill_end"
    needs_queries: ClassVar[bool] = True
    """Whether `score` reads `view.queries` (the engine records the last `window` queries only then)."""
    needs_positions: ClassVar[bool] = False
    """Whether `score` reads `view.positions` (kept per compacted token only then)."""
    needs_output_weight: ClassVar[bool] = False
    """Whether `score` reads `view.output_weight` or `view.output_gram`."""
    batched: ClassVar[bool] = False
    """Whether requests with equally many tokens may share a `view`, one after the other on its layer axis. `score` then
    reads only `n`, `chosen`, `budget` and the view's reductions of attention and keys, which gather nothing."""
    side_values: ClassVar[int] = 0
    """fp32 values kept with every token and KV head (`view.side`), written by the method while tokens are computed."""
    paper_values: ClassVar[Mapping[str, Any]] = {}
    """Option -> the paper's value, where the paper gives one that differs from the default here."""

    budget: int | None = option(
        None, "tokens kept per KV head; null = `ratio` of the prompt", unit="tokens", minimum=16
    )
    ratio: float | None = option(0.2, "share of the prompt kept where `budget` is null", maximum=1)
    window: int = option(32, "last queries that score, and last tokens that always stay", unit="tokens", minimum=1)
    sinks: int = option(4, "first tokens that always stay", unit="tokens", minimum=0)
    stride: int = option(256, "tokens between evictions (not used by one-shot methods)", unit="tokens", minimum=16)
    scope: str = option(
        "head", "one kept set per KV head, per layer, or for all layers", choices=("head", "layer", "model")
    )
    block_size: int = option(32, "tokens a KV block (= vLLM block size)", unit="tokens", choices=(16, 32, 64, 128))

    def __post_init__(self) -> None:
        name, block = self.plugin_name(), self.block_size
        if self.budget is None and self.ratio is None:
            raise ConfigError(
                f"{name} needs a budget; set {name}.budget (tokens) or {name}.ratio (share of the prompt)."
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ConfigError(f"{name}.ratio must be above 0 and at most 1, got {self.ratio}.")
        default = next(f.default for f in dataclasses.fields(self) if f.name == "ratio")
        if self.budget is not None and self.ratio not in (None, default):
            raise ConfigError(
                f"{name} takes a budget or a ratio, but {name}.budget is {self.budget} and {name}.ratio {self.ratio}; "
                "set one of them to null."
            )
        if self.trigger == "streaming" and self.budget is None:
            raise ConfigError(
                f"{name} evicts inside the prompt and needs a fixed {name}.budget in tokens, not a ratio."
            )
        if self.budget is not None and self.budget % block:
            raise ConfigError(f"{name}.budget must be a multiple of {name}.block_size ({block}), got {self.budget}.")
        if self.trigger != "prefill_end" and self.stride % block:
            raise ConfigError(f"{name}.stride must be a multiple of {name}.block_size ({block}), got {self.stride}.")
        need = self.sinks + self.window
        if self.budget is not None and self.budget < need:
            raise ConfigError(
                f"{name}.budget is {self.budget} tokens, but sinks and window alone hold {need}; raise budget or lower "
                "sinks or window."
            )

    @classmethod
    def plugin_name(cls) -> str:
        """Name in plugins.yaml and on the command line."""
        return getattr(cls, "name", cls.__name__.lower())

    def budget_for(self, prompt: int) -> int:
        """Tokens that stay per KV head of a request with `prompt` prompt tokens: a multiple of the block size.

        `ratio` counts from the prompt and is rounded up to a block; sinks and window always fit.
        """
        if self.budget is not None:
            return self.budget
        assert self.ratio is not None
        tokens = max(int(self.ratio * prompt), self.sinks + self.window)
        return -(-tokens // self.block_size) * self.block_size

    def keeps_grams(self) -> bool:
        """Whether `score` reads `view.output_gram`, which stays in memory."""
        return self.needs_output_weight

    def plan(self) -> str:
        """Tokens of a request that are resident, for `vllm-ext list`."""
        kept = f"{self.ratio:.0%} of the prompt" if self.budget is None else f"{self.budget} tokens"
        if self.trigger == "prefill_end":
            return f"the whole prompt until it ends, then {kept} and what is generated"
        most = f"{kept}, up to {self.stride} more between evictions"
        if self.trigger == "decode":
            return f"the whole prompt until it ends, then {most}"
        return f"{most}, and the tokens of steps in flight; never the whole prompt"

    def layer_shares(self, layers: int) -> list[float]:
        """Budget of each of `layers` layers relative to `budget_for`; layers of one share form a KV-cache group.

        The engine takes shares whose layers are equally many a share.
        """
        return [1.0] * layers

    def score(self, view: KVView) -> Tensor:
        """How much each resident token of one request is worth; the highest stay.

        Args:
            view: resident tokens in the order of their positions.

        Returns:
            [L, H, n] fp32, finite. Ties go to the newer token. Sinks and the last `window` tokens need no mark.
        """
        raise NotImplementedError

    def engine_args(self) -> dict[str, Any]:
        """Stock vLLM engine arguments that this plugin needs."""
        return {"attention_backend": BACKEND_NAME, "block_size": self.block_size}

    def attach(self, worker: Any) -> None:
        """Called once in every worker, before its model is built: the model runner knows the requests."""
        from vllm_ext.kv_managers import memory, rows, warm_up

        rows.bind(worker)
        memory.attach(self, worker)
        warm_up.attach(worker)

    def check(self, vllm_config: Any) -> None:
        """Refuse a model or configuration that the method cannot serve.

        Args:
            vllm_config: the finished VllmConfig, before any weight is loaded.

        Raises:
            ConfigError: one sentence that names the option and the remedy.
        """
        from vllm_ext.kv_managers.limits import check

        check(self, vllm_config)

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """What the start-up banner says of this plugin, label -> text."""
        from vllm_ext.kv_managers.limits import banner

        return banner(self, vllm_config)

    def options(self) -> dict[str, Any]:
        """The options as a plain mapping (JSON types)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
