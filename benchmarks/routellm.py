"""Our router on RouteLLM's data: which questions of MMLU and GSM8K need GPT-4 instead of Mixtral-8x7B?

python -m benchmarks.routellm ../shared/data        # the folder with the two files of answers

The files are not part of this project. They hold, for each question, whether each model was right: those of
lm-sys/RouteLLM (routellm/evals), MMLU joined with a column `subject`. The router is the policy `learned_before`, which
sees the question only. It is fitted on the other folds; folds are random, or by subject, so that the router has seen no
question of the subject.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.gap_recovered import measures
from benchmarks.record import ROOT, Row, own_versions
from lilliput.embedding.embedder import Embedder
from lilliput.embedding.sentence_embedder import open_embedder
from lilliput.errors import DataError
from lilliput.offload.fit import cross_fit, features, fit, folds_of, held_out_worth
from lilliput.offload.learned import WorthModel
from lilliput.offload.outcomes import Outcomes
from lilliput.params import load_params
from lilliput.wheels import default_cache

WEAK, STRONG = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"
FILES = {"mmlu": "routellm_mmlu_responses.csv", "gsm8k": "routellm_gsm8k_responses.csv"}
FOLDS, NEIGHBOURS, FEW = 5, 50, 1500
SENT_FIRST = 2.0  # a question longer than the embedder's input goes to the strong model, as in the gateway
# RouteLLM's routers were fitted on comparisons from Chatbot Arena, and about 1,500 labels of MMLU's validation split or
# of a judge. Their data exclude questions like those of Arena; ours do not.
PUBLISHED = {
    "source": "the authors' post of 1 July 2024 (lmsys.org); the tables of arXiv 2406.18665 could not be opened",
    "mmlu": "near random with data of Arena alone; with the labels, the causal LLM needs about 30 % less cost than "
    "random routing for half of the gap",
    "gsm8k": "40 % less cost",
}


@dataclass(frozen=True)
class Answered:
    """Questions that both models answered.

    Attributes:
        questions: the prompts.
        subjects: of MMLU; of GSM8K, which has none, the name of the benchmark.
        weak: 1.0 where the weak model was right, shape (questions,).
        strong: likewise for the strong model.
    """

    questions: list[str]
    subjects: list[str]
    weak: np.ndarray
    strong: np.ndarray

    @property
    def gain(self) -> np.ndarray:
        """Right answers of the strong model minus those of the weak one."""
        return self.strong - self.weak

    def select(self, places: Sequence[int] | np.ndarray) -> Answered:
        """Returns the questions at these places."""
        at = np.asarray(places)
        texts = [self.questions[place] for place in at], [self.subjects[place] for place in at]
        return Answered(*texts, self.weak[at], self.strong[at])


def read_answers(path: Path) -> Answered:
    """Returns the questions of a file of RouteLLM's answers.

    Raises:
        DataError: there is no such file, or it lacks a column, or a value is neither True nor False.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; name the folder with {' and '.join(FILES.values())}")
    csv.field_size_limit(2**24)
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    missing = sorted({"prompt", WEAK, STRONG} - rows[0].keys()) if rows else []
    if not rows or missing:
        what = f"lacks the column {missing[0]!r}" if rows else "has no rows"
        raise DataError(f"{path}: {what}; use the answers of lm-sys/RouteLLM, routellm/evals")
    known = {"True": 1.0, "False": 0.0}
    for number, row in enumerate(rows, 1):
        if bad := [model for model in (WEAK, STRONG) if row[model] not in known]:
            raise DataError(f"{path}: row {number}: {bad[0]} is {row[bad[0]]!r}; must be True or False")
    weak, strong = (np.array([known[row[model]] for row in rows]) for model in (WEAK, STRONG))
    return Answered([row["prompt"] for row in rows], [row.get("subject", path.stem) for row in rows], weak, strong)


def sample(answered: Answered, count: int, seed: int) -> Answered:
    """Returns `count` questions, with the shares of the subjects; all of them if there are not more."""
    if count >= len(answered.questions):
        return answered
    rng, by_subject = np.random.default_rng(seed), {}
    for place in rng.permutation(len(answered.questions)):
        by_subject.setdefault(answered.subjects[place], []).append(place)
    share = count / len(answered.questions)
    return answered.select(
        sorted(place for places in by_subject.values() for place in places[: round(share * len(places))])
    )


def embed(questions: Sequence[str], embedder: Embedder, cache: Path | None) -> np.ndarray:
    """Returns the vectors of the questions, shape (questions, dimensions), from `cache` if they are there.

    A question longer than the embedder's input has a vector of NaN.
    """
    key = hashlib.sha256("\0".join([embedder.sha256, *questions]).encode()).hexdigest()[:16]
    file = cache / f"{key}.npy" if cache else None
    if file and file.exists():
        return np.load(file)
    fitting = np.array([embedder.fits(question) for question in questions])
    short = embedder.embed([question for question, fits in zip(questions, fitting, strict=True) if fits])
    vectors = np.full((len(questions), short.shape[1]), np.nan, dtype=np.float32)
    vectors[fitting] = short
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, vectors)
    return vectors


def scores(answered: Answered, vectors: np.ndarray, groups: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """Returns the score of each question by each router; the largest goes to the strong model first.

    Args:
        answered: the questions.
        vectors: of `embed`.
        groups: of the questions; those of a group are in one fold.
        seed: of the folds and of the few questions.
    """
    fits = ~np.isnan(vectors[:, 0])
    rows = [{"question": q, "group": g} for q, g, ok in zip(answered.questions, groups, fits, strict=True) if ok]
    short, known = answered.select(np.flatnonzero(fits)), vectors[fits]
    outcomes, folds = outcomes_of(short), folds_of(rows, FOLDS, seed)
    x = features(rows, known, "before")
    dimensions = known.shape[1]
    few = _cross_fit_few(x, outcomes, folds, dimensions, seed)
    by_router = {
        "learned, before": held_out_worth(x, cross_fit(x, outcomes, folds, dimensions), folds),
        f"learned, before, fitted on {FEW}": held_out_worth(x, few, folds),
        f"{NEIGHBOURS} nearest neighbours": neighbours_gain(known, short.gain, folds, NEIGHBOURS),
    }
    return {name: _with_long(score, fits) for name, score in by_router.items()} | {"oracle": answered.gain}


def outcomes_of(answered: Answered) -> Outcomes:
    """Returns the outcomes as the router's fit takes them: no answer abstains, so hallucinations are not judged."""
    right = {"device": answered.weak, "server": answered.strong}
    none = np.zeros(len(answered.weak))
    return Outcomes(none == 0.0, none == 1.0, right, {"device": none, "server": none})


def neighbours_gain(vectors: np.ndarray, gain: np.ndarray, folds: np.ndarray, count: int) -> np.ndarray:
    """Returns the mean gain of the `count` most similar questions of the other folds, shape (questions,)."""
    score = np.zeros(len(gain))
    for fold in np.unique(folds):
        held_out, others = folds == fold, folds != fold
        similarity = vectors[held_out] @ vectors[others].T
        nearest = np.argpartition(-similarity, min(count, similarity.shape[1]) - 1, axis=1)[:, :count]
        score[held_out] = gain[others][nearest].mean(axis=1)
    return score


def _cross_fit_few(
    x: np.ndarray, outcomes: Outcomes, folds: np.ndarray, dimensions: int, seed: int
) -> dict[int, WorthModel]:
    """Returns, for each fold, a fit on as many questions of the others as RouteLLM took from MMLU."""
    rng, fitted = np.random.default_rng(seed), {}
    for fold in np.unique(folds):
        chosen = np.zeros(len(x), dtype=bool)
        chosen[rng.permutation(np.flatnonzero(folds != fold))[:FEW]] = True
        fitted[int(fold)] = fit(x[chosen], outcomes.select(chosen), dimensions)
    return fitted


def _with_long(score: np.ndarray, fits: np.ndarray) -> np.ndarray:
    everything = np.full(len(fits), SENT_FIRST)
    everything[fits] = score
    return everything


def compare(
    answered: Answered, vectors: np.ndarray, groups: Sequence[str], seed: int, resamples: int
) -> dict[str, dict[str, Any]]:
    """Returns the measures of each router with intervals; random routing has its by definition."""
    by_router = {
        name: {key: figure.as_json() for key, figure in measures(s, answered.gain, groups, seed, resamples).items()}
        for name, s in scores(answered, vectors, groups, seed).items()
    }
    return by_router | {"random": {"apgr": {"value": 0.5}, "cpt_50": {"value": 0.5}, "cpt_80": {"value": 0.8}}}


def splits(name: str, answered: Answered) -> dict[str, list[str]]:
    """Returns the groups of each way to split: at random (equal prompts stay together) and, for MMLU, by subject."""
    at_random = {"random folds": list(answered.questions)}
    return at_random | {"folds by subject": answered.subjects} if name == "mmlu" else at_random


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    data: Annotated[Path, typer.Argument(help="folder with the files of answers")],
    project: Annotated[Path, typer.Option(help="project whose params.yaml names the embedder")] = ROOT,
    questions: Annotated[int, typer.Option(help="of each benchmark, with the shares of its subjects")] = 20_000,
    resamples: Annotated[int, typer.Option(help="of the bootstrap")] = 1000,
    seed: Annotated[int, typer.Option(help="of sample, folds and bootstrap")] = 0,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps the vectors")] = None,
) -> None:
    """Writes results/routellm.json."""
    try:
        everything = {name: read_answers(data / file) for name, file in FILES.items()}
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    row = Row("routellm", "Routing: our router on RouteLLM's data (APGR; random 0.5)", "better than random")
    embedder = open_embedder(load_params(project / "params.yaml").caching.embedder, default_cache())
    reached, better = [], []
    for name, of_all in everything.items():
        answered = sample(of_all, questions, seed)
        vectors = embed(answered.questions, embedder, cache)
        for split, groups in splits(name, answered).items():
            by_router = compare(answered, vectors, groups, seed, resamples)
            row.add(f"{name}, {split}", routers=by_router, **_facts(of_all, answered, vectors))
            apgr = by_router["learned, before"]["apgr"]
            reached.append(f"{name}, {split} {apgr['value']:.3f} [{apgr['low']:.3f}, {apgr['high']:.3f}]")
            better.append(apgr["low"] > 0.5)
    settings = {"folds": FOLDS, "neighbours": NEIGHBOURS, "few": FEW, "seed": seed, "resamples": resamples}
    settings |= {"embedder_sha256": embedder.sha256, "weak": WEAK, "strong": STRONG}
    row.write("; ".join(reached), all(better), settings=settings, published=PUBLISHED)


def _facts(of_all: Answered, answered: Answered, vectors: np.ndarray) -> dict[str, Any]:
    return {
        "questions": len(answered.questions),
        "of": len(of_all.questions),
        "longer_than_embedder": int(np.isnan(vectors[:, 0]).sum()),
        "accuracy": {"weak": float(answered.weak.mean()), "strong": float(answered.strong.mean())},
        "versions": own_versions("scikit-learn", "onnxruntime", "numpy"),
    }


if __name__ == "__main__":
    app()
