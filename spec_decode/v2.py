"""Look-up drafting under model runner V2: a speculator whose step runs in stream order, without waiting for the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_ext.options import ConfigError
from vllm_ext.spec_decode import active
from vllm_ext.spec_decode.tables import LookupDrafter, LookupSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.input_batch import InputBatch


class LookupRows:
    """The look-up drafters of a worker under V2: which requests there are, and one step for all of them.

    Args:
        settings: of the drafters.
        device: where drafts are wanted; on a GPU the step is a host function in the stream.
        req_states: vLLM's request states; the texts are read from its pinned host memory.
    """

    def __init__(self, settings: LookupSettings, device: torch.device, req_states: Any) -> None:
        self.drafter, self.req_states, self.device = LookupDrafter(settings), req_states, device
        self.drafter.compile()
        tokens = req_states.all_token_ids
        if device.type == "cuda" and not hasattr(tokens, "_uva_buf"):
            raise ConfigError(
                "look-up drafting reads the texts in pinned host memory, which this system does not offer (UVA); "
                "draft with draft_model."
            )
        self._tokens = tokens._uva_buf.np if hasattr(tokens, "_uva_buf") else tokens.gpu.numpy()
        self._stream = None
        if device.type == "cuda":
            from vllm_ext.spec_decode.stream import StreamStep

            self._stream = StreamStep(self.drafter, self._tokens, req_states.total_len.gpu)

    def add(self, new_request: Any) -> None:
        """One of the scheduler's new requests (also a preempted one that returns)."""
        self.drafter.add(
            new_request.req_id,
            new_request.prefill_token_ids,
            new_request.prompt_len,
            active.tenant(new_request.sampling_params),
        )

    def propose(
        self,
        batch: InputBatch,
        num_sampled: torch.Tensor,
        drafts: torch.Tensor,
        matched: torch.Tensor | None = None,
        judged: torch.Tensor | None = None,
    ) -> None:
        """Write drafts [R, K] int64, and if wanted match lengths [R] int32, of the batch's rows.

        `judged` [R, K + 1] int32 is what a draft model says of the tokens just verified, see `lookup.step`.
        """
        verified = batch.num_draft_tokens_per_req
        verified = np.zeros(batch.num_reqs, np.int64) if verified is None else verified[: batch.num_reqs]
        rows = batch.idx_mapping_np[: batch.num_reqs]
        if self._stream is not None:
            table = self.drafter.rows(batch.req_ids, rows, 0, verified)
            self._stream.run(table, batch.num_reqs, num_sampled, drafts, matched, judged)
            return
        lengths = np.where(num_sampled.numpy()[: batch.num_reqs] > 0, self.req_states.total_len.gpu.numpy()[rows], 0)
        table = self.drafter.rows(batch.req_ids, rows, lengths, verified)
        found = np.zeros((len(table), drafts.shape[1]), np.int64)
        hits = np.zeros(len(table), np.int32)
        said = np.full((len(table), drafts.shape[1] + 1), -1, np.int32)
        if judged is not None:
            said[: batch.num_reqs] = judged.numpy()
        self.drafter.step(table, self._tokens, found, hits, said)
        drafts.copy_(torch.from_numpy(found[: batch.num_reqs]))
        if matched is not None:
            matched.copy_(torch.from_numpy(hits[: batch.num_reqs]))


class LookupSpeculator(BaseSpeculator):
    """Drafts from look-ups only. A request in whose text nothing matches is padded with its last token."""

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: Any) -> None:
        requests = vllm_config.scheduler_config.max_num_seqs
        settings = active.lookup(vllm_config)
        tokens = req_states.all_token_ids
        if device.type == "cuda" and not hasattr(tokens, "_uva_buf"):
            # the carrier method keeps texts on the GPU; these drafters want them in pinned host memory
            shape = (req_states.max_num_reqs, req_states.max_model_len)
            req_states.all_token_ids = StagedWriteTensor(shape, tokens.dtype, device, uva_instead_of_gpu=True)
        self.rows = LookupRows(settings, device, req_states)
        self.drafts = torch.zeros(requests, settings.drafts, dtype=torch.int64, device=device)
        self.counters = active.SpecCounters(vllm_config)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing is captured."""

    def capture(self) -> None:
        """Nothing is captured."""

    @torch.inference_mode()
    def propose(self, input_batch: Any, *args: Any, dummy_run: bool = False, **kwargs: Any) -> torch.Tensor:
        """[R, K] int64 on the device; see vLLM's BaseSpeculator for the arguments."""
        drafts = self.drafts[: input_batch.num_reqs]
        verified, wanted = input_batch.num_draft_tokens_per_req, kwargs.get("num_speculative_tokens")
        if not dummy_run and not self.rows.drafter.rests(wanted, verified):
            num_sampled = args[4] if len(args) > 4 else kwargs["num_sampled"]
            self.rows.propose(input_batch, num_sampled, drafts)
            self.counters.publish(self.rows.drafter)
        return drafts
