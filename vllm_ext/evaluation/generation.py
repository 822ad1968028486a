"""Free generation: text that a row writes under its plugins, judged by full attention.

Behind `length` tokens of held-out text a row draws `output` tokens x at temperature 1 from its own law q; an end token
is a token like any other. The same engine then prefills the whole text and gives log p of every drawn token. The
plugins that `rows.check_prefill` lets through leave prefill alone, so p is the law of full attention. Per drawn token,
in nats:

    nll       E_q[-log p] = H(q, p)             of the dense row: the entropy H(p) of the model's own texts
    nll_more  H(q, p) - H(p)                    row minus dense behind the same prompts; no divergence: below 0 for a
                                                row that repeats itself, hence the share of distinct 4-grams beside it
    kl        E_q[log q - log p] = KL(q || p)   of whole texts, at least 0; of the dense row: rounding, its decode steps
                                                against its own prefill

kl is estimated along the drawn texts, with log q as the decode steps gave it. Where q is itself random (sampled keys),
it is an upper bound. The first token of a text comes from the prefill and is exact in every row. Intervals: bootstrap
over texts; of nll_more, over the differences of texts behind the same prompt. Rows share the engine's seed, which makes
a row repeatable, not its draws those of another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ext.evaluation import corpus, stats
from vllm_ext.evaluation.reads import Meter
from vllm_ext.evaluation.rows import Row
from vllm_ext.evaluation.settings import Settings
from vllm_ext.evaluation.tasks import Advance, parts

GRAM = 4
"""Tokens of the n-grams whose repetition is counted."""


def run_gen(
    llm: Any, settings: Settings, row: Row, scratch: Path, recording: bool, advance: Advance
) -> list[dict[str, Any]]:
    """One cell a length.

    Args:
        scratch: a folder where the dense row (`recording`) leaves what the others are paired with.
    """
    # Under a verifier, log q of the engine is the target's and not the law that the tokens were drawn from.
    known = all(p.kind != "verifier" for p in row.plugins().values())
    cells = []
    for length in settings.lengths:
        cell, by_text = _cell(llm, settings, length, known, advance)
        file = scratch / f"gen-{length}.json"
        if recording:
            file.write_text(json.dumps(by_text["nll"]))
        else:
            dense = json.loads(file.read_text())
            cell |= _means({"nll_more": [a - b for a, b in zip(by_text["nll"], dense, strict=True)]})
        cells.append(cell | {"by_text": by_text})
    return cells


def _cell(
    llm: Any, settings: Settings, length: int, known: bool, advance: Advance
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The measures of one length, and each text's own."""
    prompts = corpus.windows(llm.get_tokenizer(), settings.texts, length)
    meter = Meter(llm)
    drawn: list[list[int]] = []
    own: list[np.ndarray] = []
    for part in parts(prompts, settings.batch):
        advance(f"gen {length}", len(drawn), len(prompts))
        for tokens, logprobs in draw(llm, part, settings.output):
            drawn.append(tokens)
            own.append(logprobs)
    read = meter.cell()
    advance(f"gen {length}", len(drawn), len(prompts))
    judged: list[np.ndarray] = []
    for part in parts([p + d for p, d in zip(prompts, drawn)], settings.batch):
        advance(f"gen {length}, judged", len(judged), len(prompts))
        judged += [x[length:] for x in prompt_logprobs(llm, part)]
    advance(f"gen {length}, judged", len(judged), len(prompts))
    by_text = {"nll": [-float(x.mean()) for x in judged], "distinct": [distinct(d) for d in drawn]}
    if known:
        by_text["kl"] = [float((q - p).mean()) for q, p in zip(own, judged)]
    cell = {"length": length, "texts": len(drawn), "output": settings.output, "tokens": sum(map(len, drawn))}
    return cell | _means(by_text) | read, by_text


def _means(by_text: dict[str, list[float]]) -> dict[str, float]:
    """Mean and interval over texts of every measure."""
    found: dict[str, float] = {}
    for name, values in by_text.items():
        low, high = stats.bootstrap_mean([[v] for v in values])
        found |= {name: float(np.mean(values)), f"{name}_low": low, f"{name}_high": high}
    return found


def draw(llm: Any, prompts: list[list[int]], output: int) -> list[tuple[list[int], np.ndarray]]:
    """Tokens drawn behind each prompt, and their log-probabilities in the decode steps that drew them."""
    from vllm import SamplingParams

    free = SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True, logprobs=0, detokenize=False)
    outputs = [o.outputs[0] for o in llm.generate([{"prompt_token_ids": p} for p in prompts], free, use_tqdm=False)]
    found = []
    for o in outputs:
        tokens = list(o.token_ids)
        if len(tokens) != output:
            raise RuntimeError(f"{len(tokens)} of {output} tokens were generated.")
        found.append((tokens, np.array([at[t].logprob for at, t in zip(o.logprobs, tokens, strict=True)])))
    return found


def prompt_logprobs(llm: Any, texts: list[list[int]]) -> list[np.ndarray]:
    """Log-probability of every token given those before it, from a prefill: [tokens], the first NaN.

    vLLM takes no prefix hits for such requests, so every position is computed.
    """
    from vllm import SamplingParams

    judge = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": t} for t in texts], judge, use_tqdm=False)
    found = []
    for o, tokens in zip(outputs, texts, strict=True):
        rows = list(o.prompt_logprobs or [])
        if len(rows) != len(tokens):
            raise RuntimeError(f"the prefill gave {len(rows)} log-probabilities for {len(tokens)} tokens.")
        found.append(np.array([np.nan] + [row[t].logprob for row, t in zip(rows[1:], tokens[1:])]))
    return found


def distinct(tokens: list[int]) -> float:
    """Distinct n-grams of `GRAM` tokens over all of them: 1 = nothing is repeated."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return len(set(grams)) / len(grams)
