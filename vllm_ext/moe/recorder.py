"""Where `moe_trace` meets the worker: ids are copied on the device in every layer, and fetched after every step."""

from __future__ import annotations

import atexit
import functools
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_ext.moe.trace_file import Trace, id_dtype, none_id

if TYPE_CHECKING:
    from vllm_ext.moe.trace import MoETrace

Span = tuple[str, int, int, int]
"""Request id, position of its first token in the step, first row, rows."""

SAVE_SECONDS = 10.0
"""A file is not rewritten more often, unless it has doubled or the server ends."""


class Capture:
    """Observer of one layer: copies the ids into its column of the step's buffer. Runs inside CUDA graphs."""

    def __init__(self, column: torch.Tensor) -> None:
        """`column`: [max tokens, W], a view of the buffer of all layers."""
        self.column = column
        self.none = 255 if column.dtype == torch.uint8 else -1

    def __call__(self, hidden: Any, logits: Any, topk_weights: Any, topk_ids: torch.Tensor) -> None:
        """See method.Observer."""
        rows, width = topk_ids.shape
        self.column[:rows, :width] = topk_ids.to(self.column.dtype)
        if width < self.column.shape[1]:
            self.column[:rows, width:] = self.none


class Recorder:
    """One worker's trace. Everything it keeps lies in host memory and is bounded by `plugin.max_tokens`."""

    def __init__(self, plugin: MoETrace, worker: Any, layers: Sequence[Any]) -> None:
        self.plugin, self.worker = plugin, worker
        self.path = Path(plugin.path).expanduser().absolute()
        self.layers = tuple(layer.facts.index for layer in layers)
        self.facts = layers[0].facts
        width = max(layer.router.width for layer in layers)
        dtype = getattr(torch, np.dtype(id_dtype(self.facts.num_experts)).name)
        graphs = worker.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        shape = (max(self.facts.max_tokens, graphs), len(layers), width)
        self.buffer = torch.zeros(shape, dtype=dtype, device=worker.device)
        for i, layer in enumerate(layers):
            layer.router.observers.append(Capture(self.buffer[:, i]))
        self.warm = False
        self.parts: dict[str, list[tuple[int, np.ndarray]]] = {}
        self.prompts: dict[str, int] = {}
        self.tokens = self.saved_tokens = 0
        self.saved_at = time.monotonic()
        self.pending: deque[tuple[torch.Tensor, Any, list[Span]]] = deque()
        worker.compile_or_warm_up_model = self._after_warm_up(worker.compile_or_warm_up_model)
        worker.execute_model = self._after_step(worker.execute_model)
        worker.shutdown = self._before_shutdown(worker.shutdown)
        atexit.register(self.save)

    def _after_warm_up(self, warm_up: Any) -> Any:
        """The warm-up of model runner V2 sends requests of its own through `execute_model`."""

        @functools.wraps(warm_up)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = warm_up(*args, **kwargs)
            self.warm = True
            return result

        return wrapper

    def _after_step(self, execute_model: Any) -> Any:
        @functools.wraps(execute_model)
        def wrapper(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            result = execute_model(scheduler_output, *args, **kwargs)
            if self.warm:
                self.step(scheduler_output)
            return result

        return wrapper

    def _before_shutdown(self, shutdown: Any) -> Any:
        @functools.wraps(shutdown)
        def wrapper() -> None:
            self.save()
            atexit.unregister(self.save)  # which would keep the engine's memory
            shutdown()

        return wrapper

    def step(self, scheduler_output: Any) -> None:
        """Start the copy of this step's rows, take in those that have arrived, and save now and then."""
        if scheduler_output.total_num_scheduled_tokens and self.tokens < self.plugin.max_tokens:
            for new in scheduler_output.scheduled_new_reqs:
                if self.sampled(new.req_id):
                    self.prompts[new.req_id] = len(new.prompt_token_ids or ())
            spans = [s for s in spans_of(self.worker.model_runner, scheduler_output) if self.sampled(s[0])]
            if spans:
                self._fetch(spans)
        self._take(wait=False)
        due = self.tokens >= 2 * self.saved_tokens or time.monotonic() - self.saved_at > SAVE_SECONDS
        full = self.tokens >= self.plugin.max_tokens
        if self.tokens > self.saved_tokens and (full or (scheduler_output.finished_req_ids and due)):
            self.save()

    def sampled(self, request: str) -> bool:
        """Whether a request is traced: a function of its id, the same in every step."""
        return zlib.crc32(request.encode()) < self.plugin.share * 2**32

    def _fetch(self, spans: list[Span]) -> None:
        rows = self.buffer[: max(first + count for _, _, first, count in spans)]
        if rows.is_cuda:
            host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            host.copy_(rows, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            host, event = rows.clone(), None
        self.pending.append((host, event, spans))
        self.tokens += sum(count for *_, count in spans)

    def _take(self, *, wait: bool) -> None:
        """Move finished copies into the requests' parts."""
        while self.pending:
            host, event, spans = self.pending[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self.pending.popleft()
            data = host.numpy()
            for request, position, first, count in spans:
                self.parts.setdefault(request, []).append((position, data[first : first + count].copy()))

    def trace(self) -> Trace:
        """Everything recorded so far, at most `max_tokens` rows."""
        self._take(wait=True)
        room = self.plugin.max_tokens
        rows, first, prompts = [], [], []
        empty = none_id(id_dtype(self.facts.num_experts))
        for request, prompt in self.prompts.items():  # in the order of arrival
            parts = self.parts.get(request)
            if not parts:
                continue
            start = min(position for position, _ in parts)
            end = max(position + len(ids) for position, ids in parts)
            whole = np.full((end - start, *self.buffer.shape[1:]), empty, dtype=parts[0][1].dtype)
            for position, ids in parts:  # in the order of computation: the last one counts
                whole[position - start : position - start + len(ids)] = ids
            rows.append(whole[:room])
            first.append(start)
            prompts.append(prompt)
            room -= len(rows[-1])
            if room <= 0:
                break
        shape = (0, *self.buffer.shape[1:])
        return Trace(
            model=Path(self.worker.model_config.model).name,
            num_experts=self.facts.num_experts,
            top_k=self.facts.top_k,
            layers=self.layers,
            experts=np.concatenate(rows) if rows else np.zeros(shape, id_dtype(self.facts.num_experts)),
            offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
            first=np.asarray(first, dtype=np.int32),
            prompt=np.asarray(prompts, dtype=np.int32),
        )

    def save(self) -> None:
        """Write the file if there is anything new. A full disk must not stop serving."""
        if self.tokens <= self.saved_tokens:
            return
        try:
            self.trace().save(self.path)
        except OSError as error:
            from vllm.logger import init_logger

            init_logger("vllm.vllm_ext").warning("moe_trace cannot write %s: %s", self.path, error)
        self.saved_tokens, self.saved_at = self.tokens, time.monotonic()


def spans_of(runner: Any, scheduler_output: Any) -> Iterator[Span]:
    """The rows of the step that has just run, in the runner's own order (V1 and V2 runners)."""
    state = getattr(runner, "execute_model_state", None)
    batch = getattr(state, "input_batch", None)
    if batch is not None:
        bounds = batch.query_start_loc_np[: len(batch.req_ids) + 1]
        starts, counts = batch.num_computed_tokens_np, np.diff(bounds).tolist()
    else:
        batch = runner.input_batch
        starts = batch.num_computed_tokens_cpu
        counts = [scheduler_output.num_scheduled_tokens[r] for r in batch.req_ids]
    row = 0
    for request, start, count in zip(batch.req_ids, starts, counts):
        yield request, int(start), row, int(count)
        row += int(count)
