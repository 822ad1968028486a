"""Methods that leave the choice of pages to another method, their host, and add to what is read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm_ext.attention_backends.method import SparseMethod
from vllm_ext.options import option

HOSTS = ("quest", "oracle_topk", "streaming")
"""Methods that can be hosts."""


@dataclass(frozen=True)
class HostedMethod(SparseMethod):
    """The host gets the options that all methods share; its own keep their defaults."""

    host: str = option("quest", "method that chooses the pages", choices=HOSTS)

    @property
    def host_method(self) -> SparseMethod:
        """The host with this method's budget, pages and layers."""
        from vllm_ext import catalogue

        shared = {f.name: getattr(self, f.name) for f in fields(SparseMethod)}
        return catalogue.get(self.host).cls()(**shared)

    def record_elements(self, head_size: int) -> int:
        """The host's page index."""
        return self.host_method.record_elements(head_size)

    def check(self, vllm_config: Any) -> None:
        """What the engine and the host refuse."""
        super().check(vllm_config)
        self.host_method.check(vllm_config)

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """Rows of the engine, and the host."""
        return super().banner(vllm_config) | {"pages chosen by": self.host}
