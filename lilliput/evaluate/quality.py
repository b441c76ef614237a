"""What a model answers: choices, references and free answers, with their figures; on any runtime."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lilliput.chat.template import encode_answer, encode_prompt
from lilliput.config import EvaluationConfig, Params
from lilliput.data.conversations import Conversation, ExpectedReference
from lilliput.data.questions import Question
from lilliput.data.rows import Row
from lilliput.evaluate import hallucination
from lilliput.evaluate.accuracy import score_choices
from lilliput.evaluate.judges.judge import judge_answer, verdict_row
from lilliput.evaluate.judges.judgement import Judgement
from lilliput.evaluate.kinds import by_kind, free_accuracy, tool_calls
from lilliput.records import Figure, Perplexity, Quality
from lilliput.runtime.protocol import AnsweringRuntime
from lilliput.statistics import intervals

RowT = TypeVar("RowT", bound=Row)


@dataclass(frozen=True)
class _Likelihood:
    """Negative log-likelihood in nats of `n` answers, which have `tokens` tokens."""

    nll: float = 0.0
    n: int = 0
    tokens: int = 0

    def __add__(self, other: _Likelihood) -> _Likelihood:
        return _Likelihood(self.nll + other.nll, self.n + other.n, self.tokens + other.tokens)

    @property
    def perplexity(self) -> Perplexity | None:
        """The perplexity per token; None without answers."""
        if not self.tokens:
            return None
        return Perplexity(value=math.exp(self.nll / self.tokens), n=self.n, tokens=self.tokens)


def new_rows(questions: Sequence[Row], contaminated: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns an answer row for each question, by id; rows that overlap with the training text are marked."""
    rows: dict[str, dict[str, Any]] = {question.id: {"id": question.id} for question in questions}
    for identity in contaminated:
        rows[identity]["contaminated"] = True
    return rows


def ask(
    runtime: AnsweringRuntime,
    tokenizer: Any,
    params: Params,
    questions: Sequence[Row],
    rows: dict[str, dict[str, Any]],
) -> Quality:
    """Asks all questions, adds the answers to `rows`, and returns their figures.

    Args:
        runtime: the model.
        tokenizer: its tokenizer.
        params: amount of measurement and system prompt.
        questions: the question set: questions and conversations.
        rows: answer rows by id, see `new_rows`.

    Raises:
        DataError: the chat template cannot render a row.
        ArtifactError: the model returns NaN.
    """
    config = params.evaluation
    likelihood = _answer_choices(runtime, tokenizer, params.data.system_prompt, questions, rows)
    likelihood += _score_references(runtime, tokenizer, params.data.system_prompt, questions, rows)
    judgements = _answer_freely(runtime, tokenizer, params, questions, rows)
    choices = [row["choice_right"] for row in rows.values() if "choice_right" in row]
    return Quality(
        accuracy_choice=Figure.of(intervals.rate(choices)),
        accuracy_free=Figure.of(free_accuracy(judgements, config.seed, config.resamples)),
        hallucination_rate=Figure.of(hallucination.hallucination_rate(judgements)),
        abstention_rate=Figure.of(hallucination.abstention_rate(judgements)),
        selective_accuracy=Figure.of(hallucination.selective_accuracy(judgements)),
        contaminated_questions=sum("contaminated" in row for row in rows.values()),
        empty_answers=sum(row.get("text") == "" for row in rows.values()),
        perplexity=likelihood.perplexity,
        by_kind=by_kind(judgements, config.seed, config.resamples),
        tool_calls=tool_calls(judgements, config.seed, config.resamples),
    )


def stratified_sample(questions: Sequence[RowT], count: int, seed: int) -> list[RowT]:
    """Draws up to `count` rows in proportion to the relations: a systematic sample along them."""
    rng = random.Random(seed)
    ordered = sorted(rng.sample(list(questions), len(questions)), key=lambda question: question.relation)
    step = max(1.0, len(ordered) / count)
    start = rng.uniform(0.0, step)
    places = (int(start + number * step) for number in range(count))
    return [ordered[place] for place in places if place < len(ordered)]


def select_free_questions(questions: Sequence[RowT], config: EvaluationConfig) -> list[RowT]:
    """Returns the rows for free answers: a seeded sample of the answerable ones and all unanswerable ones."""
    answerable = [question for question in questions if question.answerable]
    drawn = stratified_sample(answerable, config.free_questions, config.seed) if answerable else []
    return [*drawn, *(question for question in questions if not question.answerable)]


def encode_prompts(tokenizer: Any, params: Params, questions: Sequence[Row]) -> list[list[int]]:
    """Returns the token ids of the prompt of each row."""
    return [encode_prompt(tokenizer, params.data.system_prompt, question) for question in questions]


def _answer_choices(
    runtime: AnsweringRuntime,
    tokenizer: Any,
    system_prompt: str,
    questions: Sequence[Row],
    rows: dict[str, dict[str, Any]],
) -> _Likelihood:
    """Adds the model's choice to each row. Returns the likelihood of the right answers, given their questions."""
    answerable = [row for row in questions if isinstance(row, Question) and row.choices and row.answerable]
    if not answerable:
        return _Likelihood()
    scores = score_choices(runtime, tokenizer, system_prompt, answerable)
    nll, tokens = 0.0, 0
    for question, row in zip(answerable, scores, strict=True):
        picked = question.choices[int(np.argmax(row))]
        rows[question.id] |= {"choice": picked, "choice_right": picked == question.answer}
        length = len(encode_answer(tokenizer, str(question.answer), end=False))
        nll -= row[question.choices.index(str(question.answer))] * length
        tokens += length
    return _Likelihood(nll, len(answerable), tokens)


def _score_references(
    runtime: AnsweringRuntime,
    tokenizer: Any,
    system_prompt: str,
    questions: Sequence[Row],
    rows: dict[str, dict[str, Any]],
) -> _Likelihood:
    """Adds the log-likelihood per token, in nats, of the reference to each row that has only a reference."""
    scored = [
        (row, row.expectation.reference)
        for row in questions
        if isinstance(row, Conversation) and isinstance(row.expectation, ExpectedReference)
    ]
    if not scored:
        return _Likelihood()
    prompts = [encode_prompt(tokenizer, system_prompt, row) for row, _ in scored]
    references = [encode_answer(tokenizer, reference, end=False) for _, reference in scored]
    likelihoods = [score for (score,) in runtime.score(prompts, [[ids] for ids in references])]
    for (row, _), likelihood, ids in zip(scored, likelihoods, references, strict=True):
        rows[row.id]["reference_nats_per_token"] = likelihood / len(ids)
    return _Likelihood(-sum(likelihoods), len(scored), sum(map(len, references)))


def _answer_freely(
    runtime: AnsweringRuntime,
    tokenizer: Any,
    params: Params,
    questions: Sequence[Row],
    rows: dict[str, dict[str, Any]],
) -> list[Judgement]:
    """Adds the free answer and its judgement to each selected row."""
    selected = select_free_questions(questions, params.evaluation)
    prompts = encode_prompts(tokenizer, params, selected)
    judgements = []
    for row, text in zip(selected, runtime.generate(prompts, params.evaluation.max_new_tokens), strict=True):
        judgement = judge_answer(text, row)
        judgements.append(judgement)
        rows[row.id] |= verdict_row(text, row, judgement)
    return judgements
