"""The similarity threshold of the answer cache, fitted on labelled pairs to a budget of false hits."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lilliput.cache.distinguishing_words import distinguishing_words
from lilliput.data.questions import Question
from lilliput.embedding.embedder import Embedder
from lilliput.recipes.asking import subject, wordings
from lilliput.recipes.recipe import Recipe, Relation
from lilliput.records import Figure
from lilliput.statistics.intervals import rate

Kind = Literal["paraphrase", "other_entity", "other_relation", "opposite"]


@dataclass(frozen=True)
class Pair:
    """Two questions. Only those of a `paraphrase` have the same meaning."""

    kind: Kind
    first: str
    second: str

    @property
    def same_names(self) -> bool:
        """Whether the cache compares their embeddings: same distinguishing words, at least one."""
        return distinguishing_words(self.first) == distinguishing_words(self.second) != ""


def labelled_pairs(questions: Sequence[Question], recipe: Recipe, facts: int, seed: int) -> list[Pair]:
    """Pairs from up to `facts` answerable questions of a recipe.

    For each fact: two of its wordings; the same wording with another entity; and the same entity with every other
    relation of its type, including the inverse one ("What is the capital of Lima?").
    """
    rng = random.Random(f"{seed}/pairs")
    known = [subject(question) for question in questions if question.answerable]
    entities: dict[str, list[str]] = {}
    for relation, entity in known:
        entities.setdefault(relation, []).append(entity)
    pairs = []
    for relation, entity in rng.sample(known, min(facts, len(known))):
        texts_of_fact = wordings(relation, entity, recipe)
        place = rng.randrange(len(texts_of_fact))
        others: list[tuple[Kind, Sequence[str]]] = [
            ("paraphrase", [text for text in texts_of_fact if text != texts_of_fact[place]])
        ]
        other_entities = [other for other in entities[relation] if other != entity]
        others.append(("other_entity", [wordings(relation, other, recipe)[place] for other in other_entities]))
        for other, kind in _related_relations(relation, recipe):
            others.append((kind, wordings(other, entity, recipe)))
        pairs += [Pair(kind, texts_of_fact[place], rng.choice(texts)) for kind, texts in others if texts]
    return pairs


def similarities(pairs: Sequence[Pair], embedder: Embedder) -> np.ndarray:
    """Cosine similarity of each pair, shape (pairs,); −1 where the distinguishing words differ."""
    compared = [place for place, pair in enumerate(pairs) if pair.same_names]
    cosines = np.full(len(pairs), -1.0)
    texts = sorted({text for place in compared for text in (pairs[place].first, pairs[place].second)})
    if texts:
        vectors = dict(zip(texts, embedder.embed(texts), strict=True))
        cosines[compared] = [float(vectors[pairs[place].first] @ vectors[pairs[place].second]) for place in compared]
    return cosines


def fit_threshold(pairs: Sequence[Pair], cosines: np.ndarray, budget: float) -> float:
    """The lowest threshold at which at most a share `budget` of the non-paraphrases with the same names hit.

    Pairs with different names never hit. They are excluded, because they would only loosen the threshold.
    """
    wrong = sorted(
        (float(s) for pair, s in zip(pairs, cosines, strict=True) if pair.kind != "paraphrase" and pair.same_names),
        reverse=True,
    )
    allowed = math.floor(budget * len(wrong))
    return wrong[allowed] if allowed < len(wrong) else -1.0


def pair_hit_rates(pairs: Sequence[Pair], cosines: np.ndarray, threshold: float) -> dict[str, Figure]:
    """Hit rate of each kind of pair, with its interval. All hits but those of `paraphrase` are wrong.

    `same_names` has the non-paraphrases with the same names, to which the budget applies.
    """
    rows = [(pair, bool(similarity > threshold)) for pair, similarity in zip(pairs, cosines, strict=True)]
    groups = {kind: [hit for pair, hit in rows if pair.kind == kind] for kind in sorted({p.kind for p in pairs})}
    groups["same_names"] = [hit for pair, hit in rows if pair.kind != "paraphrase" and pair.same_names]
    return {name: Figure.of(rate(hits)) for name, hits in groups.items() if hits}


def _related_relations(relation: str, recipe: Recipe) -> list[tuple[str, Kind]]:
    """Other relations of the same entity type, and the inverse relation."""
    relations: dict[str, Relation] = {str(name): spec for name, spec in recipe.relations.items()}
    own, related = relations[relation], list[tuple[str, Kind]]()
    for name, spec in relations.items():
        if name != relation and spec.asks_about == own.asks_about:
            related.append((name, "other_relation"))
        elif (spec.asks_about, spec.answer) == (own.answer, own.asks_about):
            related.append((name, "opposite"))
    return related
