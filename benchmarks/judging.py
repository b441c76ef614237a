"""Evaluates all sides alike: perplexity of the right answers and four-choice accuracy on held-out questions."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.chat.template import encode_answer
from lilliput.data.corpus import Corpus
from lilliput.evaluate.accuracy import score_choices
from lilliput.runtime.torch import TorchRuntime
from lilliput.statistics.differences import compare_shares
from lilliput.statistics.intervals import rate


def judge_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, system_prompt: str
) -> dict[str, Any]:
    """Returns the figures and, for paired comparison, a string of 0 and 1 per question."""
    questions = [question for question in corpus.questions if question.choices and question.answerable]
    scores = score_choices(TorchRuntime(model, tokenizer, 16), tokenizer, system_prompt, questions)
    right, nll, tokens = [], 0.0, 0
    for question, values in zip(questions, scores, strict=True):
        answer = str(question.answer)
        right.append(question.choices[values.index(max(values))] == answer)
        length = len(encode_answer(tokenizer, answer, end=False))
        nll, tokens = nll - values[question.choices.index(answer)] * length, tokens + length
    accuracy = rate(right)
    assert accuracy is not None, "the corpus has no answerable choice questions"
    return {
        "choice_accuracy": vars(accuracy),
        "perplexity": math.exp(nll / tokens),
        "perplexity_tokens": tokens,
        "right": "".join(str(int(one)) for one in right),
    }


def paired_difference(first: str, second: str) -> dict[str, Any]:
    """Returns the difference of the shares of 1 in two strings, first − second, with interval, p and verdict."""
    after, before = ([one == "1" for one in rights] for rights in (first, second))
    comparison = compare_shares(before, after)
    return vars(comparison.difference) | {"p": comparison.p_value, "verdict": comparison.verdict}
