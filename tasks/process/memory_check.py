"""Checks by an estimate that making a candidate fits into this machine's memory, before the work starts."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

from lilliput.config import ExpertsConfig, LoadConfig, Params, Section, TrainingConfig
from lilliput.config.strategies import is_external_teacher
from lilliput.data.conversations import Conversation
from lilliput.data.rows import Row, open_rows, prompt_turns
from lilliput.errors import ConfigError
from lilliput.graph import ROOT
from lilliput.machine import Machine, this_machine
from lilliput.memory import SHORT, ExampleTokens, MemoryEstimate, Shape, estimate
from tasks import layout
from tasks.process.accelerate import training_processes
from tasks.teachers import teacher_folder

IGNORE = "LILLIPUT_IGNORE_MEMORY"  # set to 1 by --ignore-memory

_CHARACTERS_PER_TOKEN = 3.0  # of questions in Latin script; a lower value makes the estimate larger
_SAMPLE_SIZE = 10_000  # training rows that are read to find the longest
_GIB = 2**30


def training_machine(config: Section) -> Machine:
    """Returns this machine with the number of processes that would train on it."""
    return this_machine(*(training_processes() if isinstance(config, TrainingConfig) else (1, False)))


def estimates(params: Params, candidates: Collection[str], folder: Path = Path()) -> dict[str, MemoryEstimate]:
    """Returns the expected memory of making each of `candidates`; omits those of unknown shape."""
    text, expected = example_tokens(folder, params.data.longest_row_tokens), {}
    for name in candidates:
        spec, config = params.candidates[name], params.strategy_config(name)
        parent = shape_of(params, name if isinstance(config, LoadConfig) else spec.parent, folder)
        teacher = teacher_shape(params, spec.teacher, folder) if spec.teacher else None
        if parent:
            converts = isinstance(config, LoadConfig) and _converts(params, folder)
            expected[name] = estimate(config, parent, text, training_machine(config), teacher, converts=converts)
    return expected


def _converts(params: Params, folder: Path) -> bool:
    """Whether `load` opens the source in float32: as another format than safetensors, or to add tokens to it."""
    settings = folder / layout.model(ROOT) / "config.json"
    quantised = settings.exists() and "quantization_config" in json.loads(settings.read_text(encoding="utf-8"))
    return bool(params.source.file) or params.source.chat_template is not None or quantised


def require_memory(params: Params, candidates: Collection[str], folder: Path = Path()) -> None:
    """Rejects candidates that exceed this machine's memory, unless LILLIPUT_IGNORE_MEMORY is 1.

    Raises:
        ConfigError: has a line for each candidate that does not fit: expected memory, available memory, remedy.
    """
    problems = too_large(params, candidates, folder)
    if problems and os.environ.get(IGNORE) != "1":
        raise ConfigError([*problems, "These are estimates (docs/memory.md); --ignore-memory skips this check."])


def too_large(params: Params, candidates: Collection[str], folder: Path = Path()) -> list[str]:
    """Returns a message for each of `candidates` that is expected not to fit into memory."""
    problems = []
    for name, expected in estimates(params, candidates, folder).items():
        config = params.strategy_config(name)
        machine = training_machine(config)
        excess = [
            f"{need / _GIB:.1f} GiB of {kind}, of which there are {have / _GIB:.1f}"
            for kind, need, have in (
                ("memory", expected.host_bytes, machine.host_bytes),
                ("a GPU's memory", expected.gpu_bytes, machine.gpu_bytes),
            )
            if need > have
        ]
        if excess:
            problems.append(f"candidates.{name}: would take about {' and '.join(excess)}; {_remedy(config)}")
    return problems


def teacher_shape(params: Params, teacher: str, folder: Path) -> Shape | None:
    """Returns the shape of a teacher; None if it does not exist yet."""
    if not is_external_teacher(teacher):
        return shape_of(params, teacher, folder)
    settings = folder / teacher_folder(teacher) / "config.json"
    return Shape.of(json.loads(settings.read_text(encoding="utf-8"))) if settings.exists() else None


def shape_of(params: Params, candidate: str, folder: Path) -> Shape | None:
    """Returns the shape of `candidate`, or of its nearest ancestor that exists; None if there is none yet.

    An ancestor is at least as large: pruning only removes weights, and added experts are counted.
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
            return None  # a rehearsal model may have any size, and its vocabulary is unknown
        if isinstance(config, ExpertsConfig):
            experts = config.experts
        candidate = params.candidates[candidate].parent


def example_tokens(folder: Path, limit: int) -> ExampleTokens:
    """Returns the estimated tokens of the training rows in `folder`, each at most `limit`; short before they exist."""
    path = folder / layout.DATA / "train.jsonl"
    if not path.exists():
        return SHORT
    rows = list(islice(open_rows(path), _SAMPLE_SIZE))
    shared = _shared_functions(rows)
    lengths = [_lengths(row, len(shared)) for row in rows]
    (asked, mean_asked), (answered, mean_answered) = map(_longest_and_mean, zip(*lengths, strict=True))
    functions = round(_characters(shared) / _CHARACTERS_PER_TOKEN)
    return ExampleTokens(
        shared=min(SHORT.shared + functions, limit),
        rest=min(round(asked) + round(answered), limit),
        answer=min(round(answered) + 1, limit),
        mean_rest=min(mean_asked + mean_answered, limit),
        mean_answer=min(mean_answered + 1, limit),
    )


def _longest_and_mean(characters: Sequence[int]) -> tuple[float, float]:
    """Returns two lengths in tokens."""
    return max(characters) / _CHARACTERS_PER_TOKEN, fmean(characters) / _CHARACTERS_PER_TOKEN


def _shared_functions(rows: Sequence[Row]) -> Sequence[Mapping[str, Any]]:
    """Returns the functions that all lists of functions begin with: a batch runs them once."""
    lists = [row.tools for row in rows if isinstance(row, Conversation) and row.tools]
    columns = takewhile(lambda column: all(tool == column[0] for tool in column), zip(*lists, strict=False))
    return [column[0] for column in columns]


def _lengths(row: Row, shared_functions: int) -> tuple[int, int]:
    """Returns the characters before the answer, except those of shared functions, and those of the answer."""
    turns = prompt_turns(row, system_prompt="")
    asked = sum(len(turn.text) + sum(len(str(call.arguments)) for call in turn.tool_calls) for turn in turns)
    tools = row.tools[shared_functions:] if isinstance(row, Conversation) else ()
    return asked + _characters(tools), len(row.answer_text)


def _characters(tools: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(json.dumps(tool, ensure_ascii=False)) for tool in tools)


def _remedy(config: Section) -> str:
    if isinstance(config, TrainingConfig):
        return (
            "lower batch_size and raise gradient_accumulation by as much, shard the model across GPUs (FSDP), or "
            "train on a four-bit parent (variant: qlora)"
        )
    return "make it on a machine with more memory, or start from a smaller model"
