"""What a sparse attention method declares: its options, its page index, its score and its selection.

A method is a frozen dataclass: the fields are the options of the command line, the class variables fill the
slots of the pipeline index -> score -> select -> attend (see `stages.py`). No torch or vLLM import here: the
classes are read while vLLM's command line is being built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vllm_ext.options import ConfigError, option

if TYPE_CHECKING:
    from vllm_ext.attention_backends.stages import StageDims, Stages

BACKEND_NAME = "VLLM_EXT_SPARSE"
"""The name under which the one backend of all sparse methods is registered with vLLM."""

PAGE_SIZES = (16, 32, 64, 128)
"""Page sizes (tokens) that the kernels take; the CPU backend needs a multiple of 32."""


@dataclass(frozen=True)
class SparseMethod:
    """Options and slots shared by every method that reads a list of KV pages in decode steps."""

    kind: ClassVar[str] = "attention"
    index: ClassVar[Literal["none", "minmax", "mean"]] = "none"
    """What is kept for a page: nothing, channel-wise minimum and maximum of K, or the mean of K."""
    score: ClassVar[Literal["bound", "dot", "exact", "recency"]] = "recency"
    """How a page is scored for a query: bound of its logits, mean key, its exact softmax mass, its position."""
    paper_values: ClassVar[Mapping[str, Any]] = {}
    """Option -> the paper's value, where the paper gives one that differs from the default here."""

    budget: int = option(1024, "keys read per query and KV head in a sparse step", unit="tokens", minimum=16)
    page_size: int = option(64, "tokens a page (= vLLM block size)", unit="tokens", choices=PAGE_SIZES)
    dense_layers: tuple[int, ...] = option([0, 1], "layers that stay dense")
    dense_below: int | None = option(
        None, "requests up to this length are exact; null = twice the budget", unit="tokens", minimum=0
    )
    sink: int = option(1, "pages at the start that are always read", unit="pages", minimum=0)
    local: int = option(2, "pages at the end that are always read", unit="pages", minimum=1)

    def __post_init__(self) -> None:
        need = (self.sink + self.local + 1) * self.page_size
        if self.budget < need:
            raise ConfigError(
                f"{self.plugin_name()}.budget is {self.budget} tokens, but sink, local and one page to choose need "
                f"{need}; raise budget or lower sink, local or page_size."
            )

    @classmethod
    def plugin_name(cls) -> str:
        """Name in plugins.yaml and on the command line."""
        return getattr(cls, "name", cls.__name__.lower())

    @property
    def radius(self) -> float:
        """Share of a page's half-range that `bound` adds to its centre; 1 is the upper bound."""
        return 1.0

    @property
    def group(self) -> str:
        """How the scores of a GQA group's query heads combine: max, mean or softmax; a method may make it an option."""
        return "max"

    @property
    def capacity(self) -> int:
        """Length of the page list of one query and KV head, in pages."""
        return self.budget // self.page_size

    @property
    def least_keys(self) -> int:
        """Keys that a sparse step of one query and KV head reads at least; what benchmarks call its floor."""
        return self.capacity * self.page_size

    @property
    def dense_limit(self) -> int:
        """Longest request, in tokens, whose decode steps read every key."""
        return 2 * self.budget if self.dense_below is None else max(self.dense_below, 0)

    def record_elements(self, head_size: int) -> int:
        """Elements of the KV-cache dtype that the index of one page takes for one KV head."""
        return {"none": 0, "minmax": 2, "mean": 1}[self.index] * head_size

    def stages(self, dims: StageDims) -> Stages:
        """The pipeline of a decode step; a method that is not index -> score -> top-k -> attend brings its own."""
        from vllm_ext.attention_backends.stages import Stages

        return Stages(self, dims)

    def engine_args(self) -> dict[str, Any]:
        """Stock vLLM engine arguments that this plugin needs."""
        return {"attention_backend": BACKEND_NAME, "block_size": self.page_size}

    def check(self, vllm_config: Any) -> None:
        """Refuse a model or configuration that the method cannot serve.

        Args:
            vllm_config: the finished VllmConfig, before any weight is loaded.

        Raises:
            ConfigError: one sentence that names the option and the remedy.
        """
        from vllm_ext.attention_backends.limits import check

        check(self, vllm_config)

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """What the start-up banner says of this plugin, label -> text."""
        from vllm_ext.attention_backends.limits import banner

        return banner(self, vllm_config)

    def options(self) -> dict[str, Any]:
        """The options as a plain mapping (JSON types)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
