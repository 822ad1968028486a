"""Prompt look-up: continue as the text did after the most recent occurrence of its last n tokens.

Saxena, "Prompt Lookup Decoding", 2023. The baseline of the look-up drafters; vLLM's own is `ngram`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_ext.options import option
from vllm_ext.spec_decode.method import DrafterMethod


@dataclass(frozen=True)
class Ngram(DrafterMethod):
    """The longest suffix of at most `ngram` tokens that occurs before, at its most recent occurrence."""

    name: ClassVar[str] = "ngram"

    ngram: int = option(4, "longest suffix that is looked up", unit="tokens", minimum=1, maximum=64)
    min_match: int = option(1, "shortest suffix that is continued", unit="tokens", minimum=1, maximum=64)
    window: int = option(
        32768, "tokens of a request that are remembered, about 130 bytes each", unit="tokens", minimum=256
    )

    def lookup(self, requests: int, max_model_len: int) -> Any:
        from vllm_ext.spec_decode.tables import LookupSettings

        return LookupSettings(
            drafts=self.num_speculative_tokens,
            requests=requests,
            window=min(self.window, max_model_len + 1),
            arms=("ngram",),
            ngram=self.ngram,
            min_match=self.min_match,
        )
