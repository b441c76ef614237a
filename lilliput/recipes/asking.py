"""Turns facts into multiple-choice questions, and invents unanswerable questions about invented names."""

from __future__ import annotations

import difflib
import random
from collections import deque
from collections.abc import Iterable
from typing import Literal

from lilliput.data.questions import Question, normalise
from lilliput.errors import DataError
from lilliput.recipes.facts import Fact
from lilliput.recipes.recipe import Kind, Recipe, Syllables

DISTRACTORS = 3
# An invented name this similar to a real one would read as a misspelling, and an answer would be no hallucination.
TOO_SIMILAR = 0.85
_INVENTED = "invented"


def make_questions(facts: list[Fact], recipe: Recipe, seed: int) -> list[Question]:
    """Returns each fact as a four-choice question in one of its relation's phrasings.

    Distractors are distinct answers of the same relation, drawn uniformly, so that neither the type nor the frequency
    of an option reveals the answer. Each question has a separate random stream: a new fact does not reword the others.
    """
    answers: dict[str, dict[str, str]] = {}
    for fact in facts:
        answers.setdefault(fact.relation, {}).setdefault(normalise(fact.answer), fact.answer)
    return [_question(fact, answers[fact.relation], recipe, seed) for fact in facts]


def invent_questions(
    recipe: Recipe, real_names: Iterable[str], counts: dict[Literal["train", "test"], int], seed: int
) -> list[Question]:
    """Returns unanswerable questions about invented names, one per name, in the phrasings for real entities.

    Names of the training and test splits share no beginning, so a model cannot recognise them by their stems.

    Args:
        recipe: relations, phrasings and syllables.
        real_names: normalised; no invented name equals or nearly equals one of them.
        counts: number of questions per split; relations take turns while names last.
        seed: of the draw.

    Raises:
        DataError: the recipe's syllables do not give enough names.
    """
    pools = _pools(recipe, set(real_names), seed)
    rng = random.Random(f"{seed}/invent")
    questions: list[Question] = []
    for split, count in counts.items():
        wanted = len(questions) + count
        turns = deque(sorted(recipe.relations))
        while turns and len(questions) < wanted:
            relation = turns.popleft()
            if pool := pools[recipe.relations[relation].asks_about, split]:
                questions.append(_unanswerable_question(pool.pop(), relation, split, recipe, rng))
                turns.append(relation)
        if len(questions) < wanted:
            raise DataError(
                f"the recipe's syllables give {wanted - len(questions)} names too few for {count} unanswerable {split} "
                "questions; add syllables under `invented` or ask for fewer"
            )
    return questions


def subject(question: Question) -> tuple[str, str]:
    """Returns the relation and the entity in the id of a question from this module."""
    relation, _, entity = question.id.removeprefix(f"{_INVENTED}/").partition("/")
    return relation, entity


def wordings(relation: str, entity: str, recipe: Recipe) -> tuple[str, ...]:
    """Returns the question for `relation` of `entity` in each of the relation's phrasings."""
    return tuple(phrasing.format(entity=entity) for phrasing in _phrasings(recipe, relation))


def _question(fact: Fact, answers: dict[str, str], recipe: Recipe, seed: int) -> Question:
    identity = f"{fact.relation}/{fact.entity}"
    rng = random.Random(f"{seed}/ask/{identity}")
    # Drawn first: later draws depend on the number of distractors.
    text = rng.choice(_phrasings(recipe, fact.relation)).format(entity=fact.entity)
    right = {normalise(text) for text in (fact.answer, *fact.aliases)}
    wrong = [answer for plain, answer in answers.items() if plain not in right]
    choices = [fact.answer, *rng.sample(wrong, min(DISTRACTORS, len(wrong)))]
    rng.shuffle(choices)
    return Question(
        id=identity,
        question=text,
        choices=tuple(choices) if len(choices) > 1 else (),
        answer=fact.answer,
        aliases=fact.aliases,
        group=fact.group,
    )


def _phrasings(recipe: Recipe, relation: str) -> tuple[str, ...]:
    return {str(name): spec.phrasings for name, spec in recipe.relations.items()}[relation]


def _unanswerable_question(
    name: str, relation: str, split: Literal["train", "test"], recipe: Recipe, rng: random.Random
) -> Question:
    text = rng.choice(_phrasings(recipe, relation)).format(entity=name)
    return Question(
        id=f"{_INVENTED}/{relation}/{name}", question=text, answerable=False, group=f"{_INVENTED}/{name}", split=split
    )


def _pools(recipe: Recipe, real_names: set[str], seed: int) -> dict[tuple[Kind, str], list[str]]:
    """Returns shuffled invented names by kind and split; the lists are disjoint."""
    used = set(real_names)
    by_initial: dict[str, list[str]] = {}
    for name in sorted(real_names):
        by_initial.setdefault(name[0], []).append(name)
    pools = {}
    for kind in sorted(recipe.invented):
        syllables = recipe.invented[kind]
        rng = random.Random(f"{seed}/names/{kind}")
        beginnings = rng.sample(syllables.beginnings, len(syllables.beginnings))
        boundary = max(1, len(beginnings) // 3)
        for split, stems in (("test", beginnings[:boundary]), ("train", beginnings[boundary:])):
            names = [name for name in _names(syllables, stems) if not _is_used(name, used, by_initial)]
            used |= {normalise(name) for name in names}
            pools[kind, split] = rng.sample(names, len(names))
    return pools


def _names(syllables: Syllables, stems: list[str]) -> list[str]:
    return sorted({b + m + e for b in stems for m in syllables.middles for e in syllables.endings})


def _is_used(name: str, used: set[str], by_initial: dict[str, list[str]]) -> bool:
    plain = normalise(name)
    similar = by_initial.get(plain[:1], [])
    return plain in used or bool(difflib.get_close_matches(plain, similar, n=1, cutoff=TOO_SIMILAR))
