"""Needle prompts: exact length, determinism, depth, answers, question after the context."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from byte_tokenizer import byte_tokenizer

from vllm_ext.evaluation import corpus
from vllm_ext.evaluation.niah import CITIES, make_niah, score


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize("length", [700, 701, 1024, 4096, 10007])
@pytest.mark.parametrize(("keys", "values", "chat"), [(1, 1, True), (4, 1, True), (1, 3, True), (2, 2, False)])
def test_length_is_exact_and_everything_is_there(tokenizer, length, keys, values, chat):
    sample = make_niah(tokenizer, length, 0.3, 7, keys=keys, values=values, chat=chat)
    assert len(sample.prompt_token_ids) == length
    assert len(sample.answers) == values
    assert sample.prompt.count("The special magic number for ") == keys + values - 1 + (values == 1)
    for answer in sample.answers:
        assert len(answer) == 7
        assert sample.prompt.count(answer) == 1
    places = [sample.prompt.index(a) for a in sample.answers]
    assert places == sorted(places)
    assert sample.prompt.endswith(sample.prefix)


def test_question_comes_after_the_context(tokenizer):
    sample = make_niah(tokenizer, 2048, 1.0, 0)
    context = tokenizer.decode(sample.prompt_token_ids[: sample.context_tokens])
    tail = tokenizer.decode(sample.prompt_token_ids[sample.context_tokens :])
    assert sample.answers[0] in context
    assert "What is" in tail
    assert "What is the special" not in context


def test_deterministic_by_seed(tokenizer):
    first, second = (make_niah(tokenizer, 1500, 0.5, 3, keys=3) for _ in range(2))
    assert first == second
    assert make_niah(tokenizer, 1500, 0.5, 4, keys=3).prompt_token_ids != first.prompt_token_ids


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_depth(tokenizer, depth):
    sample = make_niah(tokenizer, 8000, depth, 11)
    assert abs(sample.depth - depth) < 0.06
    assert abs(sample.prompt.index(sample.answers[0]) / 8000 - depth) < 0.1


def test_needle_stands_at_a_sentence_boundary(tokenizer):
    sample = make_niah(tokenizer, 3000, 0.5, 2)
    at = sample.prompt.index(" The special magic number for ")
    assert sample.prompt[at - 1] in ".?!"


def test_keys_do_not_occur_in_the_filler():
    assert not [city for city in CITIES if city in corpus.load(corpus.FILLER)]


def test_filler_and_held_out_text_are_disjoint_and_long():
    filler, held_out = set(corpus.load(corpus.FILLER).splitlines()), corpus.load(corpus.HELD_OUT)
    assert len(corpus.load(corpus.FILLER)) > 250_000
    assert len(held_out) > 250_000
    assert not filler & set(held_out.splitlines())


def test_windows_are_exact_and_spread(tokenizer):
    parts = corpus.windows(tokenizer, 4, 1000)
    assert [len(p) for p in parts] == [1000] * 4
    assert len({tuple(p) for p in parts}) == 4
    with pytest.raises(ValueError, match="does not fit"):
        corpus.windows(tokenizer, 1, 10_000_000)


def test_bad_arguments(tokenizer):
    with pytest.raises(ValueError, match="depth"):
        make_niah(tokenizer, 1000, 1.5, 0)
    with pytest.raises(ValueError, match="keys"):
        make_niah(tokenizer, 1000, 0.5, 0, keys=0)
    with pytest.raises(ValueError, match="room"):
        make_niah(tokenizer, 200, 0.5, 0)
    with pytest.raises(ValueError, match="chat template"):
        make_niah(byte_tokenizer(chat=False), 1000, 0.5, 0)


def test_score_wants_the_number_alone():
    assert score(" 1234567.", ["1234567"]) == [True]
    assert score(" 12345678", ["1234567"]) == [False]
    assert score("7654321 and 1234567", ["1234567", "1111111"]) == [True, False]
