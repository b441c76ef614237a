"""The corpus as MLflow's dataset inputs: name, digest and split."""

from __future__ import annotations

import json

from mlflow.entities import Dataset, DatasetInput, InputTag

from lilliput.artifacts import file_sha256
from tasks import layout

_CONTEXTS = {"train": "training", "calibration": "calibration", "questions": "evaluation"}
_DIGEST_CHARS = 36  # MLflow's limit


def dataset_inputs(source: str) -> list[DatasetInput]:
    """Returns one input for each file of the corpus.

    Args:
        source: `data.source`, which the corpus was made from.
    """
    summary = json.loads((layout.DATA / "summary.json").read_text(encoding="utf-8"))
    return [_input(source, name, context, summary.get(name, {})) for name, context in _CONTEXTS.items()]


def _input(source: str, name: str, context: str, counts: dict[str, object]) -> DatasetInput:
    path = layout.DATA / f"{name}.jsonl"
    sha256 = file_sha256(path)
    dataset = Dataset(
        name=f"{source}: {name}",
        digest=sha256[:_DIGEST_CHARS],
        source_type="local",
        source=json.dumps({"uri": path.as_posix(), "sha256": sha256}),
        profile=json.dumps({key: counts[key] for key in ("rows", "groups", "unanswerable") if key in counts}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
