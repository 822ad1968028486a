"""LycheeDecode: retrieval heads read every key and choose pages, other heads inherit them (arXiv 2602.04541)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_ext.attention_backends import role_file
from vllm_ext.attention_backends.artefacts import shipped
from vllm_ext.attention_backends.method import SparseMethod
from vllm_ext.attention_backends.role_file import Map, RoleFile
from vllm_ext.attention_backends.rope import ModelShape, model_shape
from vllm_ext.options import ConfigError, option

if TYPE_CHECKING:
    from vllm_ext.attention_backends.stages import StageDims, Stages


@dataclass(frozen=True)
class Lychee(SparseMethod):
    """Every KV head has a role. A retrieval head reads all keys and keeps, for the same head of the layers behind it,
    the pages in which its mean query has the largest logits; a sparse head reads the pages that it was handed.

    Heads of the first sparse layer are retrieval heads. This is the paper's block form, with its 128 first and 256 last
    tokens always read. Roles come from `vllm-ext train lychee`; `retrieval_heads` takes another number of them, by
    their trained rank. The paper's cache correction (recomputing 32 tokens densely in place) is not done: it would
    rewrite pages that the prefix cache shares.

    `others` = "recent" is the static split of DuoAttention (arXiv 2410.10819, section 2): the other heads read the
    first `sink` and the most recent pages, `budget` in all, and retrieval heads choose nothing; sink=1, local=1,
    budget=320 is the 64 and 256 tokens of its evaluation. Roles come from the same file: DuoAttention's own way to find
    them (a gate a head, tuned on passkeys) is not here, and the other heads' old keys stay in the cache.
    """

    name: ClassVar[str] = "lychee"
    paper_values: ClassVar[Mapping[str, Any]] = {"budget": 4096}

    dense_layers: tuple[int, ...] = option([], "layers that stay dense")
    sink: int = option(2, "pages at the start that are always read", unit="pages", minimum=0)
    local: int = option(4, "pages at the end that are always read", unit="pages", minimum=1)
    roles: str | None = option(None, "JSON file of the model's head roles; null = those shipped for this model")
    others: str = option(
        "carried",
        "what the other heads read: the list of a layer before (carried), or first and last pages (recent)",
        choices=("carried", "recent"),
    )
    retrieval_heads: int | None = option(
        None, "retrieval heads behind the first layer; null = as trained", unit="heads", minimum=0
    )

    def file(self, model: ModelShape) -> RoleFile:
        """The roles of `model`.

        Raises:
            ConfigError: none are shipped for it, or the file cannot be read.
        """
        path = self.roles or shipped("roles.json", model, lambda p: json.loads(p.read_text()).get("model"))
        if path is None:
            raise ConfigError(
                f"no head roles ship for a model with {model}; train them with `vllm-ext train lychee` and pass their "
                "file as lychee.roles."
            )
        return role_file.read(path)

    def map(self, file: RoleFile) -> Map:
        """[layers][KV heads], True = retrieval head."""
        return file.retrieval if self.retrieval_heads is None else file.best(self.retrieval_heads)

    @property
    def dense_share(self) -> float:
        """Share of the model's KV heads that read every key, of the file given as `roles`."""
        heads = [x for row in self.map(role_file.read(self.roles or "")) for x in row]
        return sum(heads) / len(heads)

    def check(self, vllm_config: Any) -> None:
        """Refuse what the engine cannot serve, and roles of another model."""
        super().check(vllm_config)
        model = model_shape(vllm_config.model_config.hf_text_config)
        self.file(model).check(model)
        most = (model.layers - 1) * model.kv_heads
        if self.retrieval_heads is not None and self.retrieval_heads > most:
            raise ConfigError(
                f"lychee.retrieval_heads is {self.retrieval_heads}, but the model has {most} KV heads behind the first "
                "layer; lower it."
            )

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """Rows of the start-up banner."""
        model = model_shape(vllm_config.model_config.hf_text_config)
        file = self.file(model)
        dense = sum(map(sum, self.map(file)))
        rows = super().banner(vllm_config)
        lists = {"carried": "pages that a head of a layer before chose", "recent": "first and last pages"}[self.others]
        return {
            **rows,
            "roles": f"{dense} of {model.layers * model.kv_heads} KV heads read every key ({file.path})",
            "other heads": lists,
        }

    def stages(self, dims: StageDims) -> Stages:
        """One launch a layer for both kinds of heads."""
        from vllm_ext.attention_backends.lychee_stages import LycheeStages

        return LycheeStages(self, dims)
