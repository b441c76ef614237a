import numpy as np
import pytest

from lilliput.cache.threshold import Pair, fit_threshold, labelled_pairs, pair_hit_rates, similarities
from lilliput.data.questions import Question
from lilliput.recipes.asking import subject, wordings
from lilliput.recipes.recipe import read_recipe
from tests.embedding.fakes import BagOfWords


@pytest.fixture(scope="module")
def recipe(request):
    return read_recipe(request.config.rootpath / "corpora" / "world-facts.yaml")


@pytest.fixture
def questions():
    names = {"Peru": "Lima", "Cuba": "Havana", "Iran": "Tehran", "Chad": "N'Djamena"}
    made = [
        Question(id=f"capital/{c}", question=f"What is the capital of {c}?", answer=a, group=c)
        for c, a in names.items()
    ]
    return [*made, Question(id="invented/capital/Xia", question="Where is Xia?", answerable=False, group="x")]


def labelled(same, different):
    pairs = [Pair("paraphrase", "Is Peru big?", "Is Peru large?") for _ in same]
    pairs += [Pair("other_relation", "Is Peru big?", "Is Peru old?") for _ in different]
    return pairs, np.array([*same, *different])


@pytest.mark.parametrize("budget", [0.0, 0.01, 0.05, 0.1, 0.5])
def test_threshold_equals_brute_force(budget):
    rng = np.random.default_rng(1)
    pairs, found = labelled(rng.uniform(0.6, 1.0, 50), rng.uniform(0.3, 0.95, 200))
    threshold = fit_threshold(pairs, found, budget)
    wrong = found[50:]
    assert threshold == min(t for t in [-1.0, *wrong] if (wrong > t).mean() <= budget)


def test_pairs_with_different_names_do_not_loosen_the_budget():
    pairs, found = labelled([0.9], [0.8, 0.7])
    strangers = [Pair("other_entity", "Is Peru big?", "Is Cuba big?")] * 1000
    everything = np.concatenate([found, np.full(1000, -1.0)])
    assert fit_threshold([*pairs, *strangers], everything, 0.01) == fit_threshold(pairs, found, 0.01) == 0.8


def test_without_wrong_pairs_all_pairs_with_the_same_names_hit():
    pairs, found = labelled([0.2, 0.9], [])
    assert (found > fit_threshold(pairs, found, 0.01)).all()


def test_pairs_match_their_labels(questions, recipe):
    pairs = labelled_pairs(questions, recipe, 100, seed=3)
    by_kind = {kind: [pair for pair in pairs if pair.kind == kind] for kind in {pair.kind for pair in pairs}}
    assert {kind: len(rows) for kind, rows in by_kind.items()} == {
        "paraphrase": 4,
        "other_entity": 4,
        "other_relation": 12,  # a country also has a region, a subregion and a demonym
        "opposite": 4,
    }
    of_capitals = {text for q in questions for text in wordings(*subject(q), recipe)}
    assert all(pair.first != pair.second and {pair.first, pair.second} <= of_capitals for pair in by_kind["paraphrase"])
    assert [pair.same_names for pair in by_kind["other_entity"]] == [False] * 4
    assert all(pair.same_names and pair.second not in of_capitals for pair in by_kind["opposite"])
    assert labelled_pairs(questions, recipe, 100, seed=3) == pairs != labelled_pairs(questions, recipe, 100, seed=4)


def test_only_pairs_with_the_same_names_are_embedded():
    embedder = BagOfWords()
    pairs = [
        Pair("paraphrase", "What is the capital of Peru", "Which city is the capital of Peru"),
        Pair("other_entity", "What is the capital of Peru", "What is the capital of Cuba"),
    ]
    found = similarities(pairs, embedder)
    assert found == pytest.approx([5 / np.sqrt(42), -1.0], abs=1e-6)
    assert not any("Cuba" in text for text in embedder.embedded)
    judged = pair_hit_rates(pairs, found, 0.5)
    assert (judged["paraphrase"].value, judged["other_entity"].value) == (1.0, 0.0)
    assert "same_names" not in judged  # no non-paraphrase has the same names


def test_subject_comes_from_the_question_id(questions):
    assert subject(questions[0]) == ("capital", "Peru")
    assert subject(questions[-1]) == ("capital", "Xia")
