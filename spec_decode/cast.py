"""CAST, cost-aware draft lengths (ICLR 2026), reduced to chains: what drafts bring against what their step costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_ext.options import ConfigError, option
from vllm_ext.spec_decode.method import LengthMethod


@dataclass(frozen=True)
class Cast(LengthMethod):
    """Takes the draft length with the most expected tokens a second, 0 where drafting does not pay.

    The times are those of `vllm-ext bench cost-table` for this device, model and drafter; the expectation comes from
    what was accepted before. The paper's tree has a width too; one verified chain has none.
    """

    name: ClassVar[str] = "cast"

    table: str = option("", "file that `vllm-ext bench cost-table` wrote for this device, model and drafter")
    scope: str = option(
        "batch",
        "batch: one draft count a step, which keeps it a FULL graph; request: each request its own, 0 among them",
        choices=("batch", "request"),
    )
    margin: float = option(
        1.02, "how much faster than no drafting a length must be expected to be", minimum=1, maximum=2
    )
    probing: float = option(
        0.01, "share of the time that drafts may take while they do not pay", minimum=0, maximum=0.1
    )

    @property
    def uniform(self) -> bool:
        return self.scope == "batch"

    def check(self, vllm_config: Any) -> None:
        super().check(vllm_config)
        from vllm_ext.spec_decode.draft_length import check_table

        check_table(self._table(), vllm_config, self.choices(vllm_config.speculative_config.num_speculative_tokens))

    def policy(self, vllm_config: Any) -> Any:
        from vllm_ext.spec_decode.draft_length import CastPolicy

        return CastPolicy(self._table(), self.margin, self.probing)

    def banner(self, vllm_config: Any) -> dict[str, str]:
        about = self._table().about
        return super().banner(vllm_config) | {"times": f"{self.table}: {about['device']}, {about['drafter']}"}

    def _table(self) -> Any:
        from vllm_ext.spec_decode.draft_length import read_table

        if not self.table:
            raise ConfigError("cast.table names no file; make one with `vllm-ext bench cost-table` and give its path.")
        return read_table(self.table)
