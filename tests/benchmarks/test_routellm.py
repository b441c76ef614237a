"""RouteLLM's measures where they are known, the comparison on a small file, and the real files where they are."""

import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks import routellm
from benchmarks.gap_recovered import measures
from lilliput.errors import DataError
from tests.embedding.fakes import BagOfWords

DATA = Path(os.environ.get("LILLIPUT_ROUTELLM_DATA", routellm.ROOT.parent / "shared" / "data"))


def values(score, gain, groups=None):
    found = measures(
        np.asarray(score, float), np.asarray(gain, float), groups or list(map(str, range(len(gain)))), 0, 200
    )
    assert all(figure.low <= figure.value <= figure.high and figure.n == len(gain) for figure in found.values())
    return [found[name].value for name in ("apgr", "cpt_50", "cpt_80")]


HALF = np.array([1.0] * 500 + [0.0] * 500)  # the strong model alone is right on half of the questions


def test_a_perfect_router_recovers_the_gap_with_the_questions_that_need_it():
    assert values(HALF, HALF) == pytest.approx([0.75, 0.25, 0.40])


def test_the_worst_router_recovers_it_last():
    assert values(-HALF, HALF) == pytest.approx([0.25, 0.75, 0.90])


def test_random_scores_and_equal_scores_are_chance():
    rng = np.random.default_rng(0)
    assert values(rng.random(1000), HALF) == pytest.approx([0.5, 0.5, 0.8], abs=0.04)
    assert values(np.zeros(1000), HALF) == pytest.approx([0.5, 0.5, 0.8], abs=0.04)  # not in the order of the file


def test_the_oracle_recovers_more_than_the_gap_where_the_weak_model_is_better_too():
    gain = np.array([1.0] * 40 + [0.0] * 40 + [-1.0] * 20)  # a net gain of 20: recovered 2 from 40 % to 80 % of calls
    apgr = 0.4 * 1.0 + 0.4 * 2.0 + 0.2 * 1.5
    assert values(gain, gain) == pytest.approx([apgr, 0.10, 0.16])


def test_without_a_gap_nothing_can_be_recovered():
    with pytest.raises(ValueError, match="no gap to recover"):
        values([1.0, 2.0], [0.0, -1.0])


def test_intervals_of_questions_that_are_alike_within_groups_are_wider():
    rng = np.random.default_rng(1)
    by_group = rng.random(20) < 0.5
    score = np.repeat(rng.random(20) + by_group, 50)
    gain = np.repeat(by_group, 50).astype(float)
    alone = measures(score, gain, [str(n) for n in range(1000)], 0, 200)["apgr"]
    together = measures(score, gain, [str(n // 50) for n in range(1000)], 0, 200)["apgr"]
    assert together.value == alone.value
    assert together.high - together.low > 2 * (alone.high - alone.low)


def write(path, rows, header="subject,prompt"):
    lines = [f"{header},{routellm.WEAK},{routellm.STRONG}", *rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def easy_and_hard(count):
    """The weak model fails on questions with the word hard; the strong model is always right."""
    kinds = ["hard" if n % 2 else "easy" for n in range(count)]
    return [f'subject{n % 7},"a {kind} question {n}\nA. 1",{kind == "easy"},True' for n, kind in enumerate(kinds)]


def test_a_predictable_gap_is_recovered_by_all_routers_on_unseen_subjects(tmp_path):
    answered = routellm.read_answers(write(tmp_path / "mmlu.csv", easy_and_hard(200)))
    assert answered.questions[1] == "a hard question 1\nA. 1"
    assert (answered.weak.mean(), answered.strong.mean()) == (0.5, 1.0)
    vectors = routellm.embed(answered.questions, BagOfWords(), tmp_path / "cache")
    for split, groups in routellm.splits("mmlu", answered).items():
        found = routellm.compare(answered, vectors, groups, 0, 100)
        assert found["oracle"]["apgr"]["value"] == pytest.approx(0.75)
        for name in ("learned, before", "learned, before, fitted on 1500", "50 nearest neighbours"):
            assert found[name]["apgr"]["value"] == pytest.approx(0.75, abs=0.02), (split, name)
            assert found[name]["apgr"]["low"] > 0.6
        assert found["random"]["cpt_80"]["value"] == 0.8


def test_an_unpredictable_gap_is_not_recovered(tmp_path):
    rng = np.random.default_rng(2)
    rows = [f"s{n % 10},what is {n * 7919 % 997},{rng.random() < 0.5},True" for n in range(400)]
    answered = routellm.read_answers(write(tmp_path / "mmlu.csv", rows))
    vectors = routellm.embed(answered.questions, BagOfWords(), None)
    found = routellm.compare(answered, vectors, routellm.splits("mmlu", answered)["random folds"], 0, 200)
    assert found["learned, before"]["apgr"]["low"] < 0.5  # cross-fitting on noise ranks a little worse than chance
    assert found["learned, before"]["apgr"]["value"] == pytest.approx(0.5, abs=0.1)


def test_long_questions_go_to_the_strong_model_first_and_vectors_are_cached(tmp_path):
    rows = [*easy_and_hard(60), "subject1,one two three four five six seven eight nine,False,True"]
    answered = routellm.read_answers(write(tmp_path / "mmlu.csv", rows))
    embedder = BagOfWords(most_words=8)
    vectors = routellm.embed(answered.questions, embedder, tmp_path / "cache")
    assert np.isnan(vectors[-1]).all() and not np.isnan(vectors[:-1]).any()
    embedded = len(embedder.embedded)
    again = routellm.embed(answered.questions, embedder, tmp_path / "cache")
    assert len(embedder.embedded) == embedded
    assert np.array_equal(again, vectors, equal_nan=True)
    found = routellm.scores(answered, vectors, answered.subjects, 0)
    assert all(np.argmax(score) == 60 for name, score in found.items() if name != "oracle")


def test_a_sample_keeps_the_shares_of_the_subjects(tmp_path):
    rows = [f"{'rare' if n % 4 == 0 else 'common'},q{n},True,True" for n in range(400)]
    drawn = routellm.sample(routellm.read_answers(write(tmp_path / "mmlu.csv", rows)), 100, 0)
    assert (len(drawn.questions), drawn.subjects.count("rare")) == (100, 25)
    assert len(set(drawn.questions)) == 100


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["s,q,True,maybe"], "subject,prompt", "row 1: gpt-4-1106-preview is 'maybe'; must be True or False"),
        (["s,q,True,True"], "subject,question", "lacks the column 'prompt'; use the answers of lm-sys/RouteLLM"),
        ([], "subject,prompt", "has no rows"),
    ],
)
def test_other_files_are_rejected(tmp_path, rows, header, message):
    with pytest.raises(DataError, match=message):
        routellm.read_answers(write(tmp_path / "mmlu.csv", rows, header))


def test_missing_data_is_one_message_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        routellm.main(tmp_path)
    assert ended.value.code == 2
    assert "no such file; name the folder with routellm_mmlu_responses.csv" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "count", "weak"), [("mmlu", 14042, 0.681), ("gsm8k", 1319, 0.637)])
def test_the_real_files_have_the_accuracies_of_the_paper(name, count, weak):
    file = DATA / routellm.FILES[name]
    if not file.exists():
        pytest.skip(f"{file} is absent; set LILLIPUT_ROUTELLM_DATA to the folder of RouteLLM's answers")
    answered = routellm.read_answers(file)
    assert len(answered.questions) == count
    assert answered.weak.mean() == pytest.approx(weak, abs=0.01)
    perfect = measures(answered.gain, answered.gain, answered.questions, 0, 100)
    assert perfect["apgr"].value > 0.75
    assert perfect["cpt_50"].value == pytest.approx(0.5 * answered.gain.mean(), abs=1e-3)
