"""Facts as questions with same-type distractors, and the same questions about names that belong to nothing."""

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
# An invented name this like a real one would be a misspelling of it, and answering no hallucination.
TOO_ALIKE = 0.85
_INVENTED = "invented"


def ask(facts: list[Fact], recipe: Recipe, seed: int) -> list[Question]:
    """Each fact as a four-choice question in one of its relation's phrasings.

    The distractors are other answers of the same relation, drawn evenly among different ones, so that neither the type
    of an option nor how common it is tells which is right. Each question has a random stream of its own: another fact
    in the tables rewords none of the others.
    """
    answers: dict[str, dict[str, str]] = {}
    for fact in facts:
        answers.setdefault(fact.relation, {}).setdefault(normalise(fact.answer), fact.answer)
    return [_ask(fact, answers[fact.relation], recipe, seed) for fact in facts]


def invent(
    recipe: Recipe, real_names: Iterable[str], counts: dict[Literal["train", "test"], int], seed: int
) -> list[Question]:
    """Unanswerable questions about invented names, one a name, phrased like those about real things.

    Names to train on and names to ask about share no beginning, so a model cannot pass by knowing the stems.

    Args:
        recipe: relations, phrasings and syllables.
        real_names: normalised; no invention equals or nearly equals one of them.
        counts: how many are wanted for each split; relations get equal turns while names last.
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
                questions.append(_ask_about_nothing(pool.pop(), relation, split, recipe, rng))
                turns.append(relation)
        if len(questions) < wanted:
            raise DataError(
                f"the recipe's syllables fall {wanted - len(questions)} names short of {count} unanswerable {split} "
                "questions; add syllables under `invented` or ask for fewer"
            )
    return questions


def subject(question: Question) -> tuple[str, str]:
    """The relation and the entity of a question that `ask` or `invent` made, as its id says."""
    relation, _, entity = question.id.removeprefix(f"{_INVENTED}/").partition("/")
    return relation, entity


def wordings(relation: str, entity: str, recipe: Recipe) -> tuple[str, ...]:
    """`relation` of `entity`, asked in each of the relation's phrasings."""
    return tuple(phrasing.format(entity=entity) for phrasing in _phrasings(recipe, relation))


def _ask(fact: Fact, answers: dict[str, str], recipe: Recipe, seed: int) -> Question:
    identity = f"{fact.relation}/{fact.entity}"
    rng = random.Random(f"{seed}/ask/{identity}")
    # First, because what is drawn after the distractors depends on how many there are to draw from.
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


def _ask_about_nothing(
    name: str, relation: str, split: Literal["train", "test"], recipe: Recipe, rng: random.Random
) -> Question:
    text = rng.choice(_phrasings(recipe, relation)).format(entity=name)
    return Question(
        id=f"{_INVENTED}/{relation}/{name}", question=text, answerable=False, group=f"{_INVENTED}/{name}", split=split
    )


def _pools(recipe: Recipe, real_names: set[str], seed: int) -> dict[tuple[Kind, str], list[str]]:
    """Shuffled invented names by kind and split; no name is in two of them."""
    taken = set(real_names)
    by_initial: dict[str, list[str]] = {}
    for name in sorted(real_names):
        by_initial.setdefault(name[0], []).append(name)
    pools = {}
    for kind in sorted(recipe.invented):
        syllables = recipe.invented[kind]
        rng = random.Random(f"{seed}/names/{kind}")
        beginnings = rng.sample(syllables.beginnings, len(syllables.beginnings))
        border = max(1, len(beginnings) // 3)
        for split, stems in (("test", beginnings[:border]), ("train", beginnings[border:])):
            names = [name for name in _names(syllables, stems) if not _is_taken(name, taken, by_initial)]
            taken |= {normalise(name) for name in names}
            pools[kind, split] = rng.sample(names, len(names))
    return pools


def _names(syllables: Syllables, stems: list[str]) -> list[str]:
    return sorted({b + m + e for b in stems for m in syllables.middles for e in syllables.endings})


def _is_taken(name: str, taken: set[str], by_initial: dict[str, list[str]]) -> bool:
    plain = normalise(name)
    near = by_initial.get(plain[:1], [])
    return plain in taken or bool(difflib.get_close_matches(plain, near, n=1, cutoff=TOO_ALIKE))
