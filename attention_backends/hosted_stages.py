"""Stages whose page lists come from a host's stages."""

from __future__ import annotations

from typing import Any

from vllm_ext.attention_backends.hosted import HostedMethod
from vllm_ext.attention_backends.stages import PageLists, StageDims, Stages


class HostedStages(Stages):
    """Index and selection of the host, counted into the same totals; subclasses attend."""

    method: HostedMethod

    def __init__(self, method: HostedMethod, dims: StageDims) -> None:
        super().__init__(method, dims)
        self.host = method.host_method.stages(dims)
        self.host.stats = self.stats

    @property
    def page_bytes(self) -> int:
        """The host's."""
        return self.host.page_bytes

    def allocate(self) -> None:
        """The host's buffers, which `attend` uses too."""
        self.host.allocate()
        self.partials = self.host.partials

    def select(self, *args: Any) -> PageLists:
        """The host's lists."""
        return self.host.select(*args)

    def write_index(self, *args: Any) -> None:
        """The host's index."""
        self.host.write_index(*args)

    def reference_select(self, *args: Any) -> Any:
        """The host's list."""
        return self.host.reference_select(*args)

    def reference_index(self, *args: Any) -> None:
        """The host's index."""
        self.host.reference_index(*args)
