"""The similarity above which two questions count as the same, fitted to a budget of false hits on labelled pairs."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lilliput.cache.distinguishing_words import names_in
from lilliput.data.questions import Question
from lilliput.embedding.embedder import Embedder
from lilliput.recipes.asking import subject, wordings
from lilliput.recipes.recipe import Recipe, Relation
from lilliput.statistics.intervals import rate

EXACT_ONLY = 1.0  # no cosine is larger, so only the same wording hits
Kind = Literal["paraphrase", "other_entity", "other_relation", "opposite"]


@dataclass(frozen=True)
class Pair:
    """Two questions; only a `paraphrase` asks for the same."""

    kind: Kind
    first: str
    second: str

    @property
    def same_names(self) -> bool:
        """Whether the cache would compare their embeddings at all."""
        return names_in(self.first) == names_in(self.second) != ""


def labelled_pairs(questions: Sequence[Question], recipe: Recipe, facts: int, seed: int) -> list[Pair]:
    """Pairs from up to `facts` answerable questions of a recipe.

    For each fact: two of its wordings; the same phrasing about another entity; and the same entity with every other
    relation that it could be asked for, the opposite one included ("What is the capital of Lima?").
    """
    rng = random.Random(f"{seed}/pairs")
    known = [subject(question) for question in questions if question.answerable]
    entities: dict[str, list[str]] = {}
    for relation, entity in known:
        entities.setdefault(relation, []).append(entity)
    pairs = []
    for relation, entity in rng.sample(known, min(facts, len(known))):
        asked = wordings(relation, entity, recipe)
        place = rng.randrange(len(asked))
        others: list[tuple[Kind, Sequence[str]]] = [("paraphrase", [text for text in asked if text != asked[place]])]
        strangers = [other for other in entities[relation] if other != entity]
        others.append(("other_entity", [wordings(relation, other, recipe)[place] for other in strangers]))
        for other, kind in _relatives(relation, recipe):
            others.append((kind, wordings(other, entity, recipe)))
        pairs += [Pair(kind, asked[place], rng.choice(texts)) for kind, texts in others if texts]
    return pairs


def similarities(pairs: Sequence[Pair], embedder: Embedder) -> np.ndarray:
    """The cosine of each pair's embeddings, of shape (pairs,); −1 where the names differ, so that nothing hits."""
    compared = [place for place, pair in enumerate(pairs) if pair.same_names]
    found = np.full(len(pairs), -1.0)
    texts = sorted({text for place in compared for text in (pairs[place].first, pairs[place].second)})
    if texts:
        vectors = dict(zip(texts, embedder.embed(texts), strict=True))
        found[compared] = [float(vectors[pairs[place].first] @ vectors[pairs[place].second]) for place in compared]
    return found


def fit_threshold(pairs: Sequence[Pair], found: np.ndarray, budget: float) -> float:
    """The lowest threshold above which at most a share `budget` of the different questions of the same names lie.

    Pairs whose names differ are left out: however many there are, they would only loosen it.
    """
    wrong = sorted(
        (float(s) for pair, s in zip(pairs, found, strict=True) if pair.kind != "paraphrase" and pair.same_names),
        reverse=True,
    )
    allowed = math.floor(budget * len(wrong))
    return wrong[allowed] if allowed < len(wrong) else -1.0


def judge_pairs(pairs: Sequence[Pair], found: np.ndarray, threshold: float) -> dict[str, dict[str, Any]]:
    """The share of each kind of pair that hits, with its interval; all but `paraphrase` are wrong hits.

    `same_names` are the wrong pairs of the same names, which the budget is about.
    """
    rows = [(pair, bool(similarity > threshold)) for pair, similarity in zip(pairs, found, strict=True)]
    groups = {kind: [hit for pair, hit in rows if pair.kind == kind] for kind in sorted({p.kind for p in pairs})}
    groups["same_names"] = [hit for pair, hit in rows if pair.kind != "paraphrase" and pair.same_names]
    return {name: estimate.as_dict() for name, hits in groups.items() if (estimate := rate(hits))}


def _relatives(relation: str, recipe: Recipe) -> list[tuple[str, Kind]]:
    """Relations that `relation`'s entities have too, and the one that leads back from its answers."""
    relations: dict[str, Relation] = {str(name): spec for name, spec in recipe.relations.items()}
    mine, found = relations[relation], list[tuple[str, Kind]]()
    for name, spec in relations.items():
        if name != relation and spec.asks_about == mine.asks_about:
            found.append((name, "other_relation"))
        elif (spec.asks_about, spec.answer) == (mine.answer, mine.asks_about):
            found.append((name, "opposite"))
    return found
