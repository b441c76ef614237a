"""Makes one candidate by applying its strategy to its parent."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lilliput.artifacts import (
    Manifest,
    copy_licence,
    file_sha256,
    read_manifest,
    remove,
    require_room,
    seal,
    verify,
    write_history,
    writing,
)
from lilliput.compress.context import Context
from lilliput.compress.result import Result
from lilliput.config import Params
from lilliput.config.strategies import is_external_teacher
from lilliput.data.corpus import read_corpus
from lilliput.decoders import parameter_count
from lilliput.errors import LilliputError
from lilliput.graph import check_shape, require_hardware
from lilliput.models import read_config
from lilliput.params import load_params
from lilliput.records import CompressCost
from lilliput.saving import probe_logits, prove_reload, require_finite, save_model
from lilliput.stored_weights import keep_as_stored, release_weights
from lilliput.training.checkpoint import fingerprint
from lilliput.training.examples import TurnRules
from tasks import layout
from tasks.process.accelerate import is_main, launch, launch_command
from tasks.process.console import ERROR, EXIT_REFUSED
from tasks.process.cost import measured_cost
from tasks.process.memory_check import require_memory
from tasks.teachers import fetch_teacher, teacher_folder

RELOAD_TOLERANCE = 1e-3  # largest allowed difference of a logit; both models sum in the same order


def compress(params: Params, candidate: str) -> None:
    """Writes models/<candidate>, after a check that it reopens in a fresh process, and costs/<candidate>.json."""
    require_hardware(params, [candidate])
    if teacher := params.candidates[candidate].teacher:
        fetch_teacher(teacher)  # before several processes need it
    require_memory(params, [candidate])
    if command := launch_command(params, candidate):
        launch(command, candidate)
    else:
        make(params, candidate)


def make(params: Params, candidate: str) -> None:
    """Runs `compress` in this process; of several training processes only the main one writes."""
    spec = params.candidates[candidate]
    parent = verify(layout.model(spec.parent))
    if not is_main():
        _apply(params, candidate, _checkpoints(params, candidate, parent))
        return
    require_room(layout.model(candidate).parent, parent.size_bytes)
    with measured_cost(layout.cost(candidate), CompressCost) as cost:
        checkpoints = _checkpoints(params, candidate, parent)
        if present := [str(path.relative_to(checkpoints)) for path in checkpoints.rglob("checkpoint-*")]:
            cost["resumed_from"] = max(present)  # this cost does not include the work before the kill
        result = _apply(params, candidate, checkpoints)
        parameters = result.facts.get("parameters") or parameter_count(result.model)
        cost.update(result.checks)
        with writing(layout.model(candidate)) as directory:
            cost["reload_max_logit_difference"] = _write(result, directory)
            copy_licence(layout.model(spec.parent), directory)
            check_shape(params, candidate, read_config(directory))
            _seal(params, candidate, parent, result.facts | {"parameters": parameters}, directory)
    remove(checkpoints.parent)


def _checkpoints(params: Params, candidate: str, parent: Manifest) -> Path:
    """Returns the checkpoint folder, named by a fingerprint of all inputs; removes the folders of other inputs."""
    teacher = params.candidates[candidate].teacher
    key = fingerprint(
        params.strategy_config(candidate).model_dump(mode="json"),
        parent.artifact_sha256,
        teacher and read_manifest(teacher_folder(teacher)).artifact_sha256,
        [params.data.system_prompt, params.data.train_on, params.data.longest_row_tokens],
        {path.name: file_sha256(path) for path in sorted(layout.DATA.glob("*.jsonl"))},
    )
    folder = layout.checkpoints(candidate)
    for other in folder.glob("*"):
        if other.name != key and is_main():
            remove(other)
    return folder / key


def _apply(params: Params, candidate: str, checkpoints: Path) -> Result:
    name = params.candidates[candidate].apply
    strategy = getattr(importlib.import_module(f"lilliput.compress.{name}"), name)  # imports only its own libraries
    return strategy(_context(params, candidate, checkpoints), params.strategy_config(candidate))


def _context(params: Params, candidate: str, checkpoints: Path) -> Context:
    spec, file = params.candidates[candidate], params.source.file
    return Context(
        parent=layout.model(spec.parent),
        system_prompt=params.data.system_prompt,
        turn_rules=TurnRules(params.data.train_on, params.data.longest_row_tokens),
        open_corpus=lambda: read_corpus(layout.DATA),
        teacher=teacher_folder(spec.teacher) if spec.teacher else None,
        gguf_file=Path(file).name if file else None,
        chose_template=params.source.chat_template is not None,
        checkpoints=checkpoints,
        teacher_logits=layout.TEACHER_LOGITS,
    )


def _write(result: Result, directory: Path) -> float:
    if result.save:
        require_finite(
            result.model, torch.float32, f"{directory}: not written", "quantise to more bits, or raise damp_percent"
        )
        result.save(directory)
    else:
        save_model(result.model, result.tokenizer, directory)  # rounds the weights in place to the stored dtype
    keep_as_stored(result.model)
    expected = probe_logits(result.model, result.tokenizer)
    write_history(directory, result.history)
    release_weights(result.model)  # another process opens the model now
    return prove_reload(directory, expected, RELOAD_TOLERANCE)


def _seal(params: Params, candidate: str, parent: Manifest, facts: Mapping[str, Any], directory: Path) -> None:
    facts = dict(facts)
    teacher = params.candidates[candidate].teacher
    if teacher and is_external_teacher(teacher):
        facts |= {"teacher": teacher, "teacher_sha256": read_manifest(teacher_folder(teacher)).artifact_sha256}
    seal(
        directory,
        candidate=candidate,
        strategy=params.candidates[candidate].apply,
        config=params.strategy_config(candidate).model_dump(mode="json"),
        parent=parent,
        parameters=facts.pop("parameters"),
        facts=facts,
    )


def _one_of_several(candidate: str) -> None:
    """Runs one of the processes that accelerate starts: all train, the main one writes."""
    from accelerate import PartialState

    PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU") == "true")  # selects this process's GPU in torch
    try:
        make(load_params(layout.PARAMS), candidate)
    except LilliputError as error:
        if is_main():
            print(f"\n{ERROR}{error}\n", flush=True)
        sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    _one_of_several(sys.argv[1])
