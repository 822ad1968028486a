"""Teacher forcing through decode steps: a logits processor that notes the raw logits, then forces the next token.

Plugins of this package act in decode steps only, and a prompt is prefilled densely. Text that is to be judged
under a plugin is therefore fed token by token: each step decodes one position, the forced token becomes the next
input. One class serves both model runners of vLLM (they have different base classes); it needs an engine in the
same process only where statistics are collected (`use_tape`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as RunnerV1Base
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as RunnerV2Base

ARGUMENT = "vllm_ext_forced"
"""Key of `SamplingParams.extra_args`."""

PROCESSOR = "vllm_ext.evaluation.teacher:TeacherForcing"
"""What `LLM(logits_processors=[...])` takes."""


def forced_params(
    tokens: Sequence[int], prompt_len: int, *, key: str = "", free: int = 0, ignore_eos: bool = True
) -> SamplingParams:
    """Greedy sampling parameters whose first output tokens are `tokens`.

    Args:
        tokens: forced token ids; the first one is forced on the logits of the (dense) prefill.
        prompt_len: tokens of the prompt this goes with.
        key: name of the text on the tape; "" = nothing is collected.
        free: tokens to generate freely afterwards.
        ignore_eos: True unless the forced tokens are known to hold no end token.
    """
    script = {"tokens": list(tokens), "prompt_len": prompt_len, "key": key}
    return SamplingParams(
        temperature=0.0,
        max_tokens=len(script["tokens"]) + free,  # type: ignore[arg-type]
        ignore_eos=ignore_eos,
        detokenize=False,
        extra_args={ARGUMENT: script},
    )


@dataclass
class Tape:
    """Statistics of forced steps, and the dense run's logits on disk to compare with.

    Attributes:
        folder: where the reference logits lie, one `<key>.npy` a text, float32 `[steps, vocab]`.
        recording: True writes the reference, False compares with it.
        kl: key -> float64 `[steps]`, KL(reference || this run) in nats; not filled while recording.
        agree: key -> float64 `[steps]`, 1.0 where both runs' most likely token is the same.
        nll: key -> float64 `[steps]`, negative log-likelihood of the forced token in nats.
        dense_nll: the same under the reference; not filled while recording.

    Step 0 comes from the prefill and is no decode step; unvisited steps are NaN.
    """

    folder: Path
    recording: bool
    kl: dict[str, np.ndarray] = field(default_factory=dict)
    agree: dict[str, np.ndarray] = field(default_factory=dict)
    nll: dict[str, np.ndarray] = field(default_factory=dict)
    dense_nll: dict[str, np.ndarray] = field(default_factory=dict)
    _files: dict[str, Any] = field(default_factory=dict)

    def observe(self, scripts: list[_Script], steps: list[int], logits: torch.Tensor) -> None:
        """Take one row of raw logits `[rows, vocab]` for each script and step."""
        ours = torch.log_softmax(logits.double(), dim=-1)
        forced = torch.tensor([s.tokens[i] for s, i in zip(scripts, steps)], device=logits.device)
        self._store(self.nll, scripts, steps, -ours.gather(1, forced[:, None])[:, 0])
        files = [self._file(s, logits.shape[-1]) for s in scripts]
        if self.recording:
            values = logits.float().cpu().numpy()
            for file, step, value in zip(files, steps, values):
                file[step] = value
            return
        rows = torch.from_numpy(np.stack([file[step] for file, step in zip(files, steps)]))
        reference = rows.to(logits.device)
        theirs = torch.log_softmax(reference.double(), dim=-1)
        self._store(self.dense_nll, scripts, steps, -theirs.gather(1, forced[:, None])[:, 0])
        terms = torch.where(theirs.isinf(), 0.0, theirs.exp() * (theirs - ours))
        self._store(self.kl, scripts, steps, terms.sum(-1))
        self._store(self.agree, scripts, steps, (logits.argmax(-1) == reference.argmax(-1)).double())

    def _file(self, script: _Script, vocab: int) -> Any:
        if script.key not in self._files:
            path, shape = self.folder / f"{script.key}.npy", (len(script.tokens), vocab)
            if self.recording:
                array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            else:
                array = np.load(path, mmap_mode="r")
                if array.shape != shape:
                    raise RuntimeError(f"{path} has shape {array.shape}, this run needs {shape}.")
            self._files[script.key] = array
        return self._files[script.key]

    @staticmethod
    def _store(table: dict[str, np.ndarray], scripts: list[_Script], steps: list[int], values: torch.Tensor) -> None:
        for script, step, value in zip(scripts, steps, values.tolist()):
            column = table.setdefault(script.key, np.full(len(script.tokens), np.nan))
            column[step] = value


_tape: Tape | None = None


@contextlib.contextmanager
def use_tape(tape: Tape) -> Iterator[Tape]:
    """Collect the forced steps of in-process engines on `tape` meanwhile."""
    global _tape
    _tape, before = tape, _tape
    try:
        yield tape
    finally:
        _tape = before


@dataclass
class _Script:
    """What one request is forced to say."""

    tokens: list[int]
    prompt_len: int
    key: str
    output: list[int] | None = None
    """V1 runner: the request's own output list, which grows as it runs."""


def _script(params: SamplingParams, output: list[int] | None = None) -> _Script | None:
    given = (params.extra_args or {}).get(ARGUMENT)
    return None if given is None else _Script(given["tokens"], given["prompt_len"], given["key"], output)


class TeacherForcing(RunnerV1Base, RunnerV2Base):
    """The processor; requests without `ARGUMENT` are left alone."""

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        # V1 passes (config, device, pin_memory) and V2 (config, request states); neither is needed here.
        self._scripts: dict[int, _Script] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for a malformed script."""
        given = (sampling_params.extra_args or {}).get(ARGUMENT)
        if given is not None and set(given) != {"tokens", "prompt_len", "key"}:
            raise ValueError(f"{ARGUMENT} needs tokens, prompt_len and key, got {sorted(given)}.")

    def is_argmax_invariant(self) -> bool:
        """V1: the processor must run for greedy requests too."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: follow requests through the rows of the batch."""
        process_dict_updates(self._scripts, batch_update, lambda params, _, output: _script(params, output))

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request takes slot `req_idx`; returns whether it is forced."""
        script = _script(sampling_params)
        self._scripts.pop(req_idx, None)
        if script is not None:
            self._scripts[req_idx] = script
        return script is not None

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Note and force the rows `[rows, vocab]` of this step in place."""
        rows, scripts, steps = self._rows(logits, ctx)
        if not rows:
            return logits
        index = torch.tensor(rows, device=logits.device)
        noted = [i for i, s in enumerate(scripts) if s.key]
        if noted:
            if _tape is None:
                raise RuntimeError("a text is named for the tape, but no tape is in use in the engine's process.")
            _tape.observe([scripts[i] for i in noted], [steps[i] for i in noted], logits[index[noted]])
        forced = torch.tensor([s.tokens[i] for s, i in zip(scripts, steps)], device=logits.device)
        logits[index] = float("-inf")
        logits[index, forced] = 0.0
        return logits

    def _rows(self, logits: torch.Tensor, ctx: Any) -> tuple[list[int], list[_Script], list[int]]:
        """Rows to force now, with their scripts and the number of the output token they decide."""
        if ctx is None:
            # A row of an unfinished prefill counts as step 0 as well; it is sampled for nothing and noted again.
            candidates = [(row, s, len(s.output or ())) for row, s in self._scripts.items() if row < len(logits)]
        else:
            slots = ctx.idx_mapping_np.tolist()
            if len(slots) != len(logits):
                raise RuntimeError("teacher forcing needs one token a step; switch speculative decoding off.")
            visible = ctx.seq_lens_upper_bound_np[: len(slots)].tolist()
            known = ((row, self._scripts.get(slot)) for row, slot in enumerate(slots))
            candidates = [(row, s, visible[row] - s.prompt_len) for row, s in known if s is not None]
        active = [c for c in candidates if 0 <= c[2] < len(c[1].tokens)]
        return [c[0] for c in active], [c[1] for c in active], [c[2] for c in active]
