"""Engines of the eviction tests, and attention by definition: dense over a log of all keys, masked to what was kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "attention_backends"))

from engines import core, generate, groups, layers, leaked, outputs, pool, runner, start, tokens  # noqa: F401

SMALL = {"budget": 64, "window": 16}


def compactor(llm: Any) -> Any:
    """The one compactor of an engine in this process."""
    [group] = groups(llm)
    return group.get_metadata_builder(0).steps.compactor


def manager(llm: Any, group: int = 0) -> Any:
    """The scheduler's manager of a KV-cache group."""
    return core(llm).scheduler.kv_cache_manager.coordinator.single_type_managers[group]


class Checker:
    """Compares the attention of every step of a CPU engine with dense attention over the tokens that were kept."""

    def __init__(self, patch: pytest.MonkeyPatch, method: type) -> None:
        from vllm_ext.kv_managers import cpu_backend
        from vllm_ext.kv_managers.support import Steps

        self.worst, self.checked, self.compressed = 0.0, 0, 0
        self.log: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}
        patch.setattr(method, "needs_positions", True)
        begin, forward = Steps.begin, cpu_backend.EvictionCPUImpl.forward

        def seen_begin(steps: Any, common: Any) -> Any:
            from vllm_ext.kv_managers import rows

            found = begin(steps, common)
            self.rows, self.steps = rows.read(common, rows.runner()), steps
            self.begins = common.query_start_loc_cpu.tolist()
            return found

        def seen_forward(impl: Any, layer: Any, query: Any, key: Any, value: Any, cache: Any, meta: Any, output: Any,
                         *rest: Any, **more: Any) -> Any:  # fmt: skip
            done = forward(impl, layer, query, key, value, cache, meta, output, *rest, **more)
            if meta is not None:
                for r, row in enumerate(self.rows):
                    if row is not None:
                        part = slice(self.begins[r], self.begins[r + 1])
                        self.compare(impl, layer.layer_name, row, query[part], key[part], value[part], output[part])
            return done

        patch.setattr(Steps, "begin", seen_begin)
        patch.setattr(cpu_backend.EvictionCPUImpl, "forward", seen_forward)

    def compare(self, impl: Any, name: str, row: Any, query: Any, key: Any, value: Any, output: Any) -> None:
        """One row of one layer."""
        old = self.log.get((name, row.request)) if row.before else (key[:0].clone(), value[:0].clone())
        if old is None or len(old[0]) != row.before:
            return  # the first tokens came from the prefix cache
        keys, values = torch.cat([old[0], key]), torch.cat([old[1], value])
        self.log[name, row.request] = keys, values
        n, heads = row.after, key.shape[1]
        kept = torch.ones(heads, n, dtype=torch.bool)
        state = self.steps.compactor.requests[row.request]
        if state.start:
            at = [x.number for x in self.steps.compactor.layers].index(int(name.split(".")[2]))
            positions = state.positions[at]
            kept[:] = False
            kept.scatter_(1, positions, True)
            kept[:, state.start + positions.shape[1] :] = True
            self.compressed += 1
        q = query.view(n - row.before, heads, -1, impl.head_size).double()
        logits = torch.einsum("qhgd,nhd->hgqn", q, keys.double()) * impl.scale
        hidden = torch.arange(n)[None] > torch.arange(row.before, n)[:, None]
        logits = logits.masked_fill(hidden, -torch.inf).masked_fill(~kept[:, None, None], -torch.inf)
        want = torch.einsum("hgqn,nhd->qhgd", logits.softmax(-1), values.double()).reshape(output.shape)
        self.worst = max(self.worst, (want - output).abs().max().item())
        self.checked += 1
