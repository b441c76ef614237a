"""Routing quality: the learned router against chance, confidence, RouteLLM's factorisation and the oracle.

python -m benchmarks.routing phone-4gb       # after the stage offload@phone-4gb

All rank the same questions, which both device and edge server answered. Fits use the other folds. The score is the area
between the curve over the offloaded share and chance, divided by the oracle's (similar to APGR).

RouteLLM's package is not run, because it embeds through OpenAI's API. This file re-implements its matrix factorisation
(arXiv 2406.18665) on the same pairs and sentence embeddings: p(server better) = σ(w · ((v_server − v_device) ∘ W x)),
cross-entropy, Adam at 3e-4 with weight decay 1e-5, batches of 64, 128 dimensions. There are few pairs, so it trains for
many epochs and keeps the best one on validation questions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.record import Row, own_versions
from lilliput.data.jsonl import read_rows
from lilliput.embedding.sentence_embedder import open_embedder
from lilliput.offload.fit import cross_fit, features, folds_of, held_out_worth
from lilliput.offload.judge import areas, device_confidence
from lilliput.offload.outcomes import Outcomes
from lilliput.params import load_params
from lilliput.wheels import default_cache

EPOCHS, BATCH, DIMENSIONS, VALIDATION = 170, 64, 128, 0.15


class Factorisation(torch.nn.Module):
    """Two model vectors and a projection of the question; gives the logit that the server answers better."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.models = torch.nn.Embedding(2, DIMENSIONS)
        self.project = torch.nn.Linear(dimensions, DIMENSIONS, bias=False)
        self.weigh = torch.nn.Linear(DIMENSIONS, 1, bias=False)

    def forward(self, questions: torch.Tensor) -> torch.Tensor:
        """Logits, float32 of shape (questions,), for unit vectors of shape (questions, dimensions)."""
        device, server = torch.nn.functional.normalize(self.models.weight, dim=-1)
        return self.weigh((server - device) * self.project(questions))[:, 0]


def main(
    device: Annotated[str, typer.Argument(help="a name under `serving`")] = "phone-4gb",
    project: Annotated[Path, typer.Option(help="folder with the stage's answers")] = Path(),
    seeds: Annotated[int, typer.Option(help="number of seeds for folds and RouteLLM's initial weights")] = 5,
) -> None:
    """Writes results/routing.json."""
    row = Row("routing", "Routing: area under accuracy and cost, share of the oracle's", "nearest to the oracle")
    params = load_params(project / "params.yaml")
    serving = params.serving[device]
    answers = read_rows(project / "offload" / device / "answers.jsonl")
    outcomes = Outcomes.from_rows(answers)
    vectors = open_embedder(params.caching.embedder, default_cache()).embed([answer["question"] for answer in answers])
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in ("learned, before", "learned, after", "routellm mf")}
    for seed in range(seeds):
        folds = folds_of(answers, serving.offload.folds, serving.offload.seed + seed)
        for look in ("before", "after"):
            x = features(answers, vectors, look)
            fitted = cross_fit(x, outcomes, folds, vectors.shape[1])
            drawn[f"learned, {look}"].append(held_out_worth(x, fitted, folds))
        drawn["routellm mf"].append(_factorised(vectors, outcomes.gain > 0.0, folds, seed))
    fixed = {"threshold": [-device_confidence(answers)], "oracle": [outcomes.gain]}
    for name, scores in (drawn | fixed).items():
        draws = [areas(score, outcomes, params.evaluation.seed, params.evaluation.resamples) for score in scores]
        row.add(
            name,
            **{
                metric: {
                    "mean": float(np.mean([one[metric].value for one in draws])),
                    "fold_draws": [round(one[metric].value, 4) for one in draws],
                    "interval_of_first": [draws[0][metric].low, draws[0][metric].high],
                    "n": draws[0][metric].n,
                }
                for metric in draws[0]
            },
            versions=own_versions("torch", "scikit-learn"),
        )
    row.add("random", both={"mean": 0.0}, note="by definition")
    row.absent(
        "routellm (package)",
        "embeds through OpenAI's API, and ships a router trained on other models; its method is re-implemented instead",
        "none that could be compared: other models, other questions",
        "arXiv 2406.18665",
    )
    reach = {name: facts["both"]["mean"] for name, facts in row.sides.items() if name not in ("oracle", "random")}
    best = max(reach, key=reach.__getitem__)
    summary = ", ".join(f"{name} {value:.2f}" for name, value in reach.items())
    row.write(f"{summary} of the oracle's area (n = {len(answers)})", best.startswith("learned"))


def _factorised(vectors: np.ndarray, better: np.ndarray, folds: np.ndarray, seed: int) -> np.ndarray:
    """Logit of each question by a factorisation fitted on the other folds."""
    logits = np.zeros(len(vectors))
    questions, labels = torch.tensor(vectors), torch.tensor(better, dtype=torch.float32)
    for fold in np.unique(folds):
        held_out = torch.tensor(folds == fold)
        model = _fit(questions[~held_out], labels[~held_out], seed)
        with torch.inference_mode():
            logits[folds == fold] = model(questions[held_out]).numpy()
    return logits


def _fit(questions: torch.Tensor, labels: torch.Tensor, seed: int) -> Factorisation:
    torch.manual_seed(seed)
    order = torch.randperm(len(questions))
    validation, train = order[: round(VALIDATION * len(order))], order[round(VALIDATION * len(order)) :]
    model = Factorisation(questions.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4, weight_decay=1e-5)
    best, kept = float("inf"), model.state_dict()
    for _ in range(EPOCHS):
        for rows in train[torch.randperm(len(train))].split(BATCH):
            loss = binary_cross_entropy_with_logits(model(questions[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            loss = binary_cross_entropy_with_logits(model(questions[validation]), labels[validation]).item()
        if loss < best:
            best, kept = loss, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    return model


if __name__ == "__main__":
    typer.run(main)
