"""Make one candidate by applying its strategy to its parent."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch

from lilliput.artifacts import (
    Manifest,
    file_sha256,
    read_manifest,
    remove,
    require_room,
    seal,
    verify,
    write_history,
    writing,
)
from lilliput.compress.result import Result
from lilliput.config import (
    AwqConfig,
    DistillConfig,
    ExpertsConfig,
    GptqConfig,
    LoadConfig,
    LoraConfig,
    Params,
    RtnConfig,
)
from lilliput.data.corpus import read_corpus
from lilliput.errors import LilliputError
from lilliput.graph import check_shape, require_gpu
from lilliput.models import (
    open_model,
    parameter_count,
    probe_logits,
    prove_reload,
    read_config,
    require_finite,
    save_model,
)
from lilliput.params import load_params
from lilliput.training.checkpoint import fingerprint
from tasks import layout
from tasks.process.accelerate import is_main, launch, launch_command
from tasks.process.console import ERROR, EXIT_REFUSED
from tasks.process.cost import measured_cost
from tasks.process.memory_check import require_memory

RELOAD_TOLERANCE = 1e-3  # largest difference of any logit; the reloaded model sums the same numbers in the same order


def compress(params: Params, candidate: str) -> None:
    """Writes models/<candidate>, after checking that it reopens in a fresh process, and costs/<candidate>.json."""
    require_gpu(params, [candidate])
    require_memory(params, [candidate])
    if command := launch_command(params, candidate):
        launch(command, candidate)
    else:
        make(params, candidate)


def make(params: Params, candidate: str) -> None:
    """Makes `candidate` in this process; if several processes train together, only the main one writes."""
    spec = params.candidates[candidate]
    parent = verify(layout.model(spec.parent))
    if not is_main():
        _apply(params, candidate, _checkpoints(params, candidate, parent))
        return
    require_room(layout.model(candidate).parent, parent.size_bytes)
    with measured_cost(layout.cost(candidate)) as cost:
        checkpoints = _checkpoints(params, candidate, parent)
        if found := [str(path.relative_to(checkpoints)) for path in checkpoints.rglob("checkpoint-*")]:
            cost["resumed_from"] = max(found)  # this cost excludes the work before the interruption
        result = _apply(params, candidate, checkpoints)
        cost.update(result.checks)
        with writing(layout.model(candidate)) as directory:
            cost["reload_max_logit_difference"] = _write(result, directory)
            check_shape(params, candidate, read_config(directory))
            _seal(params, candidate, parent, result, directory)
    remove(checkpoints.parent)


def _checkpoints(params: Params, candidate: str, parent: Manifest) -> Path:
    """Returns the folder for training state, named by a fingerprint of all inputs; removes outdated ones."""
    teacher = params.candidates[candidate].teacher
    key = fingerprint(
        params.strategy_config(candidate).model_dump(mode="json"),
        parent.artifact_sha256,
        teacher and read_manifest(layout.model(teacher)).artifact_sha256,
        params.data.system_prompt,
        {path.name: file_sha256(path) for path in sorted(layout.DATA.glob("*.jsonl"))},
    )
    folder = layout.checkpoints(candidate)
    for other in folder.glob("*"):
        if other.name != key and is_main():
            remove(other)
    return folder / key


def _apply(params: Params, candidate: str, checkpoints: Path) -> Result:
    spec, config = params.candidates[candidate], params.strategy_config(candidate)
    parent_dir, system_prompt = layout.model(spec.parent), params.data.system_prompt
    if isinstance(config, LoadConfig):
        from lilliput.compress.load import load

        gguf = params.source.file and Path(params.source.file).name
        return load(parent_dir, gguf, config)
    corpus = read_corpus(layout.DATA)
    if isinstance(config, LoraConfig):
        from lilliput.compress.lora import lora

        return lora(parent_dir, corpus.train, system_prompt, config, checkpoints)
    if isinstance(config, DistillConfig):
        from lilliput.compress.distill import distill

        assert spec.teacher is not None, "held by check_graph"
        teacher_dir, cache = layout.model(spec.teacher), layout.TEACHER_LOGITS
        return distill(parent_dir, teacher_dir, corpus.train, system_prompt, config, cache, checkpoints)
    if isinstance(config, ExpertsConfig):
        from lilliput.compress.experts import experts

        return experts(parent_dir, corpus.train, system_prompt, config, checkpoints)
    held_out = [question for question in corpus.questions if question.answerable][:32]
    if isinstance(config, RtnConfig):
        from lilliput.compress.rtn import rtn

        return rtn(parent_dir, held_out, system_prompt, config)
    if isinstance(config, AwqConfig):
        from lilliput.compress.awq import awq

        return awq(parent_dir, corpus.calibration, held_out, system_prompt, config)
    if isinstance(config, GptqConfig):
        from lilliput.compress.gptq import gptq

        return gptq(parent_dir, corpus.calibration, held_out, system_prompt, config)
    # Every other strategy is the function of its module's name, with these arguments.
    strategy = getattr(importlib.import_module(f"lilliput.compress.{spec.apply}"), spec.apply)
    return strategy(open_model(parent_dir), corpus.calibration, system_prompt, config)


def _write(result: Result, directory: Path) -> float:
    if result.save:
        require_finite(
            result.model, torch.float32, f"{directory}: not written", "quantise to more bits, or raise damp_percent"
        )
        result.save(directory)
    else:
        save_model(result.model, result.tokenizer, directory)  # rounds the weights in place to the stored precision
    expected = probe_logits(result.model.float(), result.tokenizer)
    write_history(directory, result.history)
    return prove_reload(directory, expected, RELOAD_TOLERANCE)


def _seal(params: Params, candidate: str, parent: Manifest, result: Result, directory: Path) -> None:
    facts = dict(result.facts)
    parameters = facts.pop("parameters", None) or parameter_count(result.model)
    seal(
        directory,
        candidate=candidate,
        strategy=params.candidates[candidate].apply,
        config=params.strategy_config(candidate).model_dump(mode="json"),
        parent=parent,
        parameters=parameters,
        facts=facts,
    )


def _main(candidate: str) -> None:
    """Runs in each process that accelerate starts: all train, the main one writes."""
    from accelerate import PartialState

    PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU") == "true")  # selects this process's GPU for torch
    try:
        make(load_params(layout.PARAMS), candidate)
    except LilliputError as error:
        if is_main():
            print(f"\n{ERROR}{error}\n", flush=True)
        sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    _main(sys.argv[1])
