from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from lilliput.config import DataConfig
from lilliput.data.corpus import Corpus, read_corpus, write_corpus
from lilliput.data.questions import Question, write_questions
from lilliput.errors import DataError
from lilliput.recipes.build import build_corpus


@pytest.fixture
def corpus(tiny, tmp_path, cache) -> Corpus:
    return build_corpus(tiny, tmp_path, cache)


def own(tmp_path: Path, tiny: DataConfig, questions: list[Question], **changes: object) -> DataConfig:
    write_questions(tmp_path / "own.jsonl", questions)
    return tiny.model_copy(update={"source": "own.jsonl", **changes})


def fact(number: int, **changes: object) -> Question:
    row = {"id": f"q{number}", "question": f"What is fact {number}?", "answer": str(number), "group": f"g{number}"}
    return Question.model_validate(row | changes)


def stored(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_no_group_and_no_wording_is_on_both_sides(corpus):
    assert not {q.group for q in corpus.train} & {q.group for q in corpus.questions}
    assert not {q.question for q in corpus.train} & {q.question for q in corpus.questions}
    assert {q.group.partition("/")[0] for q in corpus.train if q.answerable} == {"country", "element"}
    assert {q.group.partition("/")[0] for q in corpus.questions if q.answerable} == {"country", "element"}


def test_sizes_and_shares_are_as_configured(corpus, tiny):
    known = sum(q.answerable for q in corpus.train)
    assert len(corpus.train) - known == round(known * 0.25)  # 0.2 of all
    assert sum(q.answerable for q in corpus.questions) == 9
    assert sum(not q.answerable for q in corpus.questions) == 4
    assert len(corpus.calibration) == 10
    assert sum(not q.answerable for q in corpus.calibration) == 2
    assert {q.id for q in corpus.calibration} <= {q.id for q in corpus.train}


def test_answerable_questions_are_drawn_without_repetition_in_the_configured_number(corpus):
    drawn = [q.id for q in corpus.questions if q.answerable]
    assert len(set(drawn)) == len(drawn) == 9


def test_a_corpus_makes_a_round_trip_and_its_summary_adds_up(corpus, tmp_path):
    write_corpus(corpus, tmp_path / "data")
    read = read_corpus(tmp_path / "data")
    assert [*read.train] == [*corpus.train]
    assert (read.calibration, read.questions) == (corpus.calibration, corpus.questions)
    assert sorted(stored(tmp_path / "data")) == ["calibration.jsonl", "questions.jsonl", "summary.json", "train.jsonl"]
    summary = json.loads((tmp_path / "data/summary.json").read_text())
    for name in ("train", "calibration", "questions"):
        counts = summary[name]
        assert counts["rows"] == len(getattr(corpus, name))
        assert counts["rows"] == counts["unanswerable"] + sum(counts["answerable"].values())


def test_the_same_configuration_gives_the_same_bytes_and_another_seed_others(tiny, tmp_path, cache):
    for name, config in (("a", tiny), ("b", tiny), ("c", tiny.model_copy(update={"seed": 8}))):
        write_corpus(build_corpus(config, tmp_path, cache), tmp_path / name)
    assert stored(tmp_path / "a") == stored(tmp_path / "b")
    assert stored(tmp_path / "a")["train.jsonl"] != stored(tmp_path / "c")["train.jsonl"]
    assert stored(tmp_path / "a")["questions.jsonl"] != stored(tmp_path / "c")["questions.jsonl"]


def test_asking_more_moves_no_entity_and_drops_no_question(tiny, tmp_path, cache):
    few = build_corpus(tiny, tmp_path, cache)
    many = build_corpus(tiny.model_copy(update={"choice_questions": 14}), tmp_path, cache)
    assert [*few.train] == [*many.train]
    assert {q.id for q in few.questions} < {q.id for q in many.questions}


def test_writing_replaces_an_older_corpus_whole(corpus, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/stale.jsonl").write_text("old")
    write_corpus(corpus, tmp_path / "data")
    assert not (tmp_path / "data/stale.jsonl").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".data")] == []


def test_own_rows_need_no_choices_and_smaller_sources_are_taken_whole(tiny, tmp_path, cache):
    rows = [fact(n) for n in range(20)] + [fact(n, answer=None, answerable=False) for n in range(20, 30)]
    corpus = build_corpus(own(tmp_path, tiny, rows, choice_questions=400), tmp_path, cache)
    answerable = {name: {q.id for q in getattr(corpus, name) if q.answerable} for name in ("train", "questions")}
    # All 20 are used, each once: 0.6 of the 30 groups are for training, whatever is answerable among them.
    assert answerable["train"] | answerable["questions"] == {f"q{n}" for n in range(20)}
    assert not answerable["train"] & answerable["questions"]
    assert corpus.summary["questions"]["answerable"] == {"question": len(answerable["questions"])}


def test_a_split_by_hand_is_kept(tiny, tmp_path, cache):
    rows = [fact(n, split="test" if n == 3 else "train") for n in range(8)]
    corpus = build_corpus(own(tmp_path, tiny, rows), tmp_path, cache)
    assert [q.id for q in corpus.questions] == ["q3"]
    assert len(corpus.train) == 7


def test_many_kinds_of_one_group_each_are_split_all_the_same(tiny, tmp_path, cache):
    rows = [fact(n, group=f"kind{n}/only") for n in range(10)]
    corpus = build_corpus(own(tmp_path, tiny, rows, choice_questions=10), tmp_path, cache)
    assert (len(corpus.train), len(corpus.questions)) == (6, 4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([fact(1)], "1 groups leave no answerable question held out for evaluation"),
        ([fact(1, split="test")], "no answerable question to train on"),
        ([fact(1, group="g", split="test"), fact(2, group="g", split="train")], "group 'g' is in both splits"),
        (
            [fact(1, split="train"), fact(2, question="what is FACT 1", split="test")],
            "'q2' is a test question, but 'q1' of the same group or wording is in training",
        ),
    ],
)
def test_a_source_that_cannot_be_split_is_refused(tiny, tmp_path, cache, rows, message):
    with pytest.raises(DataError, match=message):
        build_corpus(own(tmp_path, tiny, rows), tmp_path, cache)


def test_sums_that_differ_in_a_sign_are_different_questions(tiny, tmp_path, cache):
    rows = [fact(1, question="3 + 4?", split="train"), fact(2, question="3 - 4?", split="test")]
    assert [q.id for q in build_corpus(own(tmp_path, tiny, rows), tmp_path, cache).questions] == ["q2"]


@pytest.mark.parametrize("source", ["nowhere.yaml", "nowhere.jsonl"])
def test_a_missing_source_is_named(tiny, tmp_path, cache, source):
    with pytest.raises(DataError, match=rf"{source}: no such file"):
        build_corpus(tiny.model_copy(update={"source": source}), tmp_path, cache)


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no corpus here \(train\.jsonl is missing\)"):
        read_corpus(tmp_path)


def test_a_training_text_of_any_length_is_built_and_read_without_being_held(tiny, tmp_path, cache):
    count, text = 4000, "word " * 400
    rows = (fact(n, question=f"{n} {text}", group=f"g{n // 4}") for n in range(count))
    write_questions(tmp_path / "own.jsonl", rows)
    held = (tmp_path / "own.jsonl").stat().st_size
    config = tiny.model_copy(update={"source": "own.jsonl"})
    tracemalloc.start()
    try:
        write_corpus(build_corpus(config, tmp_path, cache), tmp_path / "data")
        corpus = read_corpus(tmp_path / "data")
        assert sum(len(question.question) for question in corpus.train) > count * 1000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < held / 4


def test_a_row_of_the_training_text_that_was_spoilt_is_named_when_it_is_read(corpus, tmp_path):
    write_corpus(corpus, tmp_path / "data")
    lines = (tmp_path / "data/train.jsonl").read_text(encoding="utf-8").split("\n")
    (tmp_path / "data/train.jsonl").write_text("\n".join([lines[0], "{}", *lines[2:]]), encoding="utf-8")
    train = read_corpus(tmp_path / "data").train
    assert train[0] == corpus.train[0]
    with pytest.raises(DataError, match=r"train\.jsonl:2: the key `id` is missing"):
        list(train)
