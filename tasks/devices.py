"""Evaluate one compiled model on all questions, and measure it on each device that runs its target."""

from __future__ import annotations

from pathlib import Path

from lilliput.artifacts import read_manifest, verify, write_json
from lilliput.config import Params
from lilliput.contamination import find_contaminated
from lilliput.data.corpus import read_corpus
from lilliput.data.jsonl import write_rows
from lilliput.decoders import is_quantised
from lilliput.devices.measure import measure_on_devices
from lilliput.errors import ArtifactError
from lilliput.models import read_config
from tasks import layout


def devices(params: Params, name: str) -> None:
    """Writes answers/compiled/<name>.jsonl and metrics/devices/<name>.json."""
    config = params.compile[name]
    folder = layout.compiled(config.candidate, config.target)
    manifest = verify(folder)
    float_parent = _float_parent(config.candidate)
    corpus = read_corpus(layout.DATA)
    measured = measure_on_devices(
        config.candidate,
        config.target,
        folder,
        layout.model(config.candidate),
        float_parent,
        corpus.questions,
        params,
        manifest,
        contaminated=find_contaminated(corpus.train, corpus.questions),
        root=Path(),
    )
    write_rows(layout.compiled_answers(name), measured.answers)
    write_json(layout.devices(name), measured.record)


def _float_parent(candidate: str) -> tuple[str, Path]:
    """Returns name and folder of the nearest candidate with float weights: itself, or the one that was quantised.

    It is no dependency of its own: the manifest of each candidate has the sha256 of its parent, which is checked here.

    Raises:
        ArtifactError: an ancestor is missing, or was made again since.
    """
    folder = layout.model(candidate)
    manifest = read_manifest(folder)
    while manifest.parent and is_quantised(read_config(folder)):
        folder = layout.model(manifest.parent)
        parent = read_manifest(folder)
        if parent.artifact_sha256 != manifest.parent_sha256:
            raise ArtifactError(
                f"{folder}: {manifest.candidate} was made from another version of {manifest.parent}; run `dvc repro`, "
                f"which makes {manifest.candidate} again"
            )
        manifest = parent
    return manifest.candidate, folder
