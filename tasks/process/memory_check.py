"""Whether this machine's memory holds what is to be made on it, by estimate, before anything expensive starts."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import replace
from itertools import islice
from pathlib import Path

from lilliput.config import ExpertsConfig, LoadConfig, Params, Section, TrainingConfig
from lilliput.data.questions import QuestionFile
from lilliput.errors import ConfigError
from lilliput.graph import ROOT
from lilliput.memory import SHORT, Estimate, Machine, Shape, Text, estimate, this_machine
from tasks import layout
from tasks.process.accelerate import shared_among

IGNORE = "LILLIPUT_IGNORE_MEMORY"  # set to 1 by --ignore-memory

_CHARACTERS_A_TOKEN = 3.0  # of questions in Latin script; fewer make the estimate larger
_LOOKED_AT = 10_000  # training questions, by which the longest is told
_GIB = 2**30


def machine_for(config: Section) -> Machine:
    """This machine, and how many processes would train together on it."""
    return this_machine(*(shared_among() if isinstance(config, TrainingConfig) else (1, False)))


def estimates(params: Params, candidates: Collection[str], folder: Path = Path()) -> dict[str, Estimate]:
    """What making each of `candidates` is expected to take; those whose shape nobody knows yet are left out."""
    text, found = _text(folder), {}
    for name in candidates:
        spec, config = params.candidates[name], params.strategy_config(name)
        parent = shape_of(params, name if isinstance(config, LoadConfig) else spec.parent, folder)
        teacher = shape_of(params, spec.teacher, folder) if spec.teacher else None
        if parent:
            found[name] = estimate(config, parent, text, machine_for(config), teacher)
    return found


def require_memory(params: Params, candidates: Collection[str], folder: Path = Path()) -> None:
    """Refuses to make what this machine cannot hold, unless LILLIPUT_IGNORE_MEMORY is 1.

    Raises:
        ConfigError: one line for each candidate that does not fit: what is expected, what there is, what helps.
    """
    problems = too_large(params, candidates, folder)
    if problems and os.environ.get(IGNORE) != "1":
        raise ConfigError([*problems, "These are estimates (docs/memory.md); --ignore-memory tries all the same."])


def too_large(params: Params, candidates: Collection[str], folder: Path = Path()) -> list[str]:
    """A line for each of `candidates` that is expected not to fit into this machine's memory."""
    problems = []
    for name, expected in estimates(params, candidates, folder).items():
        config = params.strategy_config(name)
        machine = machine_for(config)
        over = [
            f"{need / _GIB:.1f} GiB of {kind}, of which there are {have / _GIB:.1f}"
            for kind, need, have in (
                ("memory", expected.host_bytes, machine.host_bytes),
                ("a GPU's memory", expected.gpu_bytes, machine.gpu_bytes),
            )
            if need > have
        ]
        if over:
            problems.append(f"candidates.{name}: would take about {' and '.join(over)}; {_remedy(config)}")
    return problems


def shape_of(params: Params, candidate: str, folder: Path) -> Shape | None:
    """The shape of `candidate` if it is made, else that of what it is to be made from.

    That is at least its own: pruning only takes away, and experts are counted. None where nothing is there yet.
    """
    experts = 1
    while True:
        settings = folder / layout.model(candidate) / "config.json"
        if settings.exists():
            shape = Shape.of(json.loads(settings.read_text(encoding="utf-8")))
            return shape and replace(shape, experts=max(experts, shape.experts))
        if candidate == ROOT:
            return None
        config = params.strategy_config(candidate)
        if isinstance(config, LoadConfig) and config.rehearsal:
            return None  # as small as one likes, and the tokenizer's size is not known
        if isinstance(config, ExpertsConfig):
            experts = config.experts
        candidate = params.candidates[candidate].parent


def _text(folder: Path) -> Text:
    path = folder / layout.DATA / "train.jsonl"
    if not path.exists():
        return SHORT
    questions = islice(QuestionFile(path), _LOOKED_AT)  # of what may be a million, for each stage anew
    own, answer = (
        round(max((len(text or "") for text in texts), default=0) / _CHARACTERS_A_TOKEN)
        for texts in zip(*((question.question, question.answer) for question in questions), strict=True)
    )
    return Text(SHORT.shared, own + answer, answer + 1)


def _remedy(config: Section) -> str:
    if isinstance(config, TrainingConfig):
        return (
            "lower batch_size and raise gradient_accumulation by as much, share the model out among GPUs (FSDP), or "
            "train beside four bits (variant: qlora)"
        )
    return "make it on a machine with more memory, or start from a smaller model"
