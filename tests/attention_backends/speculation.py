"""N-gram speculation in a process of its own.

The proposer imports llvmlite, and vLLM 0.32 cannot start another engine in a process that did:
`triton_utils.dispatcher` fails over an object of it.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from definition import Checker
from engines import generate, leaked, start, tokens, wrong_records

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
OUTPUT = 36


def repetitive_prompts() -> list[list[int]]:
    """Prompts in which a lookup of the last tokens finds something; lengths on and around page ends."""
    rnd = random.Random(1)
    return [(tokens(rnd, 9) * 99)[:n] for n in (31, 32, 64, 95, 188, 320)]


def run(model: str, options: dict[str, Any], name: str = "quest") -> dict[str, Any]:
    """Two rounds under a method with speculation; what was drafted, accepted and compared."""
    with (
        pytest.MonkeyPatch.context() as patch,
        start(model, {name: options}, speculative_config=NGRAM, disable_log_stats=False) as llm,
    ):
        checker = Checker(patch)
        first, again = (generate(llm, repetitive_prompts(), OUTPUT) for _ in range(2))
        metrics = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
        return {
            "first": first,
            "again": again,
            "wrong_records": wrong_records(llm)[0],
            "leaked": leaked(llm),
            "drafted": metrics["vllm:spec_decode_num_draft_tokens"],
            "accepted": metrics["vllm:spec_decode_num_accepted_tokens"],
            "several": checker.several,
            "partial": checker.partial,
            "worst": checker.worst,
        }
