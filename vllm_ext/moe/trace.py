"""`moe_trace`: writes which experts every token of a sample of requests used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vllm_ext.moe.method import MoEMethod
from vllm_ext.options import ConfigError, option


@dataclass(frozen=True)
class MoETrace(MoEMethod):
    """Records routing without changing it; `vllm-ext moe report` reads the file.

    Whole requests are sampled, up to `max_tokens` tokens in all; after that nothing is copied any more. Expert ids are
    logical ones, before EPLB. Of tokens that are computed twice (preemption, rejected drafts) the last time counts.
    """

    name: ClassVar[str] = "moe_trace"
    observes: ClassVar[bool] = True

    path: str = option("moe-trace.safetensors", "file to write; an older one is replaced")
    share: float = option(1.0, "share of the requests that is traced", minimum=0, maximum=1)
    max_tokens: int = option(262144, "most tokens in the file", unit="tokens", minimum=1)

    def check(self, vllm_config: Any) -> None:
        """See MoEMethod; also refuses parallelism that splits a request's tokens or layers, and a path that is none."""
        super().check(vllm_config)
        parallel = vllm_config.parallel_config
        for flag in ("data_parallel_size", "pipeline_parallel_size"):
            if getattr(parallel, flag) > 1:
                raise ConfigError(
                    f"--plugins moe_trace writes one file and does not support --{flag.replace('_', '-')} "
                    f"{getattr(parallel, flag)}; trace with 1."
                )
        folder = Path(self.path).expanduser().absolute().parent
        if not folder.is_dir():
            raise ConfigError(f"moe_trace.path is in '{folder}', which does not exist; make it or choose another path.")

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """See MoEMethod."""
        where = f"{Path(self.path).expanduser().absolute()}, up to {self.max_tokens} tokens"
        return super().banner(vllm_config) | {"traces": f"{self.share:.0%} of the requests to {where}"}

    def loaded(self, worker: Any, layers: Sequence[Any]) -> None:
        """See MoEMethod; the first tensor-parallel rank records, since all route alike."""
        from vllm.distributed.parallel_state import get_tp_group

        from vllm_ext.moe.recorder import Recorder

        if get_tp_group().is_first_rank:
            Recorder(self, worker, layers)
