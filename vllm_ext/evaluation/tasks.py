"""The measurements on one running engine; each returns JSON-ready cells, one for each length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vllm_ext.evaluation import corpus, niah, stats
from vllm_ext.evaluation.reads import Meter
from vllm_ext.evaluation.settings import ANSWER_TOKENS, Settings
from vllm_ext.evaluation.teacher import Tape, forced_params, use_tape

Advance = Callable[[str, int, int], None]
"""Called with what is running, how much of it is done, and how much there is."""


def run_niah(llm: Any, settings: Settings, advance: Advance) -> list[dict[str, Any]]:
    """Accuracy of needle retrieval with a Wilson interval, greedy, depths spread evenly.

    With the question in the prompt, the answer's first token comes from the dense prefill and the others from decode
    steps; with `settings.decode_question` the question and the begun answer go through decode steps as well.
    """
    return [_niah_cell(llm, settings, length, advance) for length in settings.lengths]


def _niah_cell(llm: Any, settings: Settings, length: int, advance: Advance) -> dict[str, Any]:
    tokenizer = llm.get_tokenizer()
    depths = [(i + 0.5) / settings.samples for i in range(settings.samples)]
    samples = [
        niah.make_niah(
            tokenizer, length, d, settings.seed + i, keys=settings.keys, values=settings.values, chat=settings.chat
        )
        for i, d in enumerate(depths)
    ]
    found: list[list[bool]] = []
    texts: list[str] = []
    meter = Meter(llm)
    for part in parts(samples, settings.batch):
        advance(f"niah {length}", len(found), len(samples))
        texts += _answers(llm, settings, part)
        found += [niah.score(t, s.answers) for t, s in zip(texts[len(found) :], part)]
    advance(f"niah {length}", len(found), len(samples))
    correct = sum(map(all, found))
    low, high = stats.wilson(correct, len(found))
    return {
        "length": length,
        "keys": settings.keys,
        "values": settings.values,
        "decode_question": settings.decode_question,
        "samples": len(found),
        "correct": correct,
        "accuracy": correct / len(found),
        "low": low,
        "high": high,
        "needles_found": float(np.mean([f for flags in found for f in flags])),
        **meter.cell(),
        "answers": [
            {"depth": s.depth, "expected": s.answers, "generated": t, "correct": all(f)}
            for s, t, f in zip(samples, texts, found)
        ],
    }


def _answers(llm: Any, settings: Settings, samples: list[niah.NiahSample]) -> list[str]:
    """Greedy answers of some samples."""
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    free = ANSWER_TOKENS * settings.values
    if not settings.decode_question:
        plain = SamplingParams(temperature=0.0, max_tokens=free, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": s.prompt_token_ids} for s in samples], plain, use_tqdm=False)
        return [tokenizer.decode(o.outputs[0].token_ids) for o in outputs]
    prompts = [{"prompt_token_ids": s.prompt_token_ids[: s.context_tokens]} for s in samples]
    tails = [s.prompt_token_ids[s.context_tokens :] for s in samples]
    params = [forced_params(t, s.context_tokens, free=free) for t, s in zip(tails, samples)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for output, tail in zip(outputs, tails):
        check_forced(list(output.outputs[0].token_ids), tail)
    return [tokenizer.decode(o.outputs[0].token_ids[len(t) :]) for o, t in zip(outputs, tails)]


def check_forced(produced: list[int], forced: list[int]) -> None:
    """Raise RuntimeError unless `produced` begins with `forced`: without this, nothing measured would mean anything."""
    if produced[: len(forced)] != list(forced):
        at = next((i for i, (a, b) in enumerate(zip(produced, forced)) if a != b), len(produced))
        raise RuntimeError(f"teacher forcing failed at output token {at} of {len(forced)}.")


def run_forced(llm: Any, settings: Settings, tape: Tape, advance: Advance) -> list[dict[str, Any]]:
    """Feed held-out text through decode steps; one cell a length with perplexity and, unless recording, divergence.

    Position 0 of each text comes from the dense prefill and is left out.
    """
    cells = []
    for length in settings.lengths:
        texts = corpus.windows(llm.get_tokenizer(), settings.texts, length + settings.positions + 1)
        keys = [f"{length}-{i}" for i in range(len(texts))]
        done, meter = 0, Meter(llm)
        with use_tape(tape):
            for part in parts(list(zip(keys, texts)), settings.batch):
                advance(f"kl/ppl {length}", done, len(texts))
                prompts = [{"prompt_token_ids": t[:length]} for _, t in part]
                params = [forced_params(t[length:], length, key=k) for k, t in part]
                outputs = llm.generate(prompts, params, use_tqdm=False)
                for output, (_, text) in zip(outputs, part):
                    check_forced(list(output.outputs[0].token_ids), text[length:])
                done += len(part)
        advance(f"kl/ppl {length}", done, len(texts))
        cells.append(_forced_cell(settings, length, tape, keys) | meter.cell())
    return cells


def _forced_cell(settings: Settings, length: int, tape: Tape, keys: list[str]) -> dict[str, Any]:
    cell: dict[str, Any] = {"length": length, "texts": len(keys), "positions": settings.positions}
    nll = _decoded(tape.nll, keys)
    low, high = stats.bootstrap_mean(nll)
    mean = float(np.concatenate(nll).mean())
    cell["ppl"] = {"nll": mean, "nll_low": low, "nll_high": high}
    cell["ppl"] |= {"ppl": math.exp(mean), "low": math.exp(low), "high": math.exp(high)}
    if tape.recording:
        return cell
    # Texts differ far more than methods do: the difference to dense, position by position, is the sharp measure.
    more = [ours - dense for ours, dense in zip(nll, _decoded(tape.dense_nll, keys))]
    low, high = stats.bootstrap_mean(more)
    cell["ppl"] |= {"nll_more": float(np.concatenate(more).mean()), "nll_more_low": low, "nll_more_high": high}
    kl = _decoded(tape.kl, keys)
    flat = np.concatenate(kl)
    low, high = stats.bootstrap_mean(kl)
    same = int(np.concatenate(_decoded(tape.agree, keys)).sum())
    agree_low, agree_high = stats.wilson(same, flat.size)
    cell["kl"] = {"mean": float(flat.mean()), "low": low, "high": high, "median": float(np.median(flat))}
    cell["kl"] |= {"p99": float(np.quantile(flat, 0.99)), "max": float(flat.max()), "tokens": int(flat.size)}
    cell["kl"] |= {"agree": same / flat.size, "agree_low": agree_low, "agree_high": agree_high}
    return cell


def _decoded(table: dict[str, np.ndarray], keys: list[str]) -> list[np.ndarray]:
    """Each text's values without the prefill position; every decode position must have been seen."""
    columns = [table[k][1:] for k in keys]
    if any(np.isnan(c).any() for c in columns):
        raise RuntimeError("a forced decode position left no statistics behind.")
    return columns


def parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    """The items in lists of at most `size`."""
    for i in range(0, len(items), size):
        yield items[i : i + size]
