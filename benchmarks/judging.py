"""One judge for all: perplexity of the right answers and four-choice accuracy, on held-out questions."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.chat.template import encode_answer
from lilliput.data.corpus import Corpus
from lilliput.evaluate.accuracy import choose
from lilliput.runtime.torch import TorchRuntime
from lilliput.statistics.differences import compare_shares
from lilliput.statistics.intervals import rate


def judged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, system_prompt: str
) -> dict[str, Any]:
    """The figures, and which questions were right, so that two models can be compared on the same ones."""
    questions = [question for question in corpus.questions if question.choices and question.answerable]
    scores = choose(TorchRuntime(model, tokenizer, 16), tokenizer, system_prompt, questions)
    right, nll, tokens = [], 0.0, 0
    for question, values in zip(questions, scores, strict=True):
        answer = str(question.answer)
        right.append(question.choices[values.index(max(values))] == answer)
        length = len(encode_answer(tokenizer, answer, end=False))
        nll, tokens = nll - values[question.choices.index(answer)] * length, tokens + length
    accuracy = rate(right)
    assert accuracy is not None, "there are no questions to judge by"
    return {
        "choice_accuracy": accuracy.as_dict(),
        "perplexity": math.exp(nll / tokens),
        "perplexity_tokens": tokens,
        "right": "".join(str(int(one)) for one in right),
    }


def paired(first: str, second: str) -> dict[str, Any]:
    """The difference in accuracy of two `right` strings, first − second, with its interval, p and verdict."""
    after, before = ([one == "1" for one in rights] for rights in (first, second))
    found = compare_shares(before, after)
    return found.difference.as_dict() | {"p": found.p_value, "verdict": found.verdict}
