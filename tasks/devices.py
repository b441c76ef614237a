"""Measure one compiled model on each device that runs its target."""

from __future__ import annotations

from lilliput.artifacts import verify, write_json
from lilliput.config import Params
from lilliput.data.corpus import read_corpus
from lilliput.devices.measure import measure_on_devices
from tasks import layout


def devices(params: Params, name: str) -> None:
    """Writes metrics/devices/<name>.json."""
    config = params.compile[name]
    folder = layout.compiled(config.candidate, config.target)
    manifest = verify(folder)
    questions = read_corpus(layout.DATA).questions
    checkpoint = layout.model(config.candidate)
    record = measure_on_devices(config.candidate, config.target, folder, checkpoint, questions, params, manifest)
    write_json(layout.devices(name), record)
