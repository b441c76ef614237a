"""Compile one candidate for one target, and prove parity with its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lilliput.artifacts import PARITY, copy_licence, seal, verify, write_json, writing
from lilliput.config import AutogptqTarget, GgufTarget, OnnxTarget, Params, TargetConfig
from lilliput.data.corpus import read_corpus
from lilliput.data.jsonl import read_rows
from tasks import layout
from tasks.process.cost import measured_cost


def compile_candidate(params: Params, name: str) -> None:
    """Writes compiled/<candidate>/<target>, including its parity record, and costs/compile-<name>.json."""
    from lilliput.compile.parity import prove_parity  # imports torch

    config = params.compile[name]
    checkpoint = layout.model(config.candidate)
    parent = verify(checkpoint)
    folder = layout.compiled(config.candidate, config.target)
    with measured_cost(layout.cost(f"compile-{name}")), writing(folder) as directory:
        facts = _compile(checkpoint, directory, config)
        parity = prove_parity(
            config.candidate,
            config.target,
            directory,
            checkpoint,
            read_corpus(layout.DATA).questions,
            _choices(config.candidate),
            params.data.system_prompt,
            params.parity,
        )
        write_json(directory / PARITY, parity)
        copy_licence(checkpoint, directory)
        seal(
            directory,
            candidate=name,
            strategy=config.target,
            config=config.model_dump(mode="json"),
            parent=parent,
            parameters=parent.parameters,
            facts=facts,
        )


def _compile(checkpoint: Path, directory: Path, config: TargetConfig) -> dict[str, Any]:
    # Each target has its own heavy libraries.
    if isinstance(config, GgufTarget):
        from lilliput.compile.gguf import compile_gguf

        return compile_gguf(checkpoint, directory, config)
    if isinstance(config, OnnxTarget):
        from lilliput.compile.onnx import compile_onnx

        return compile_onnx(checkpoint, directory, config)
    assert isinstance(config, AutogptqTarget)
    from lilliput.compile.autogptq import compile_autogptq

    return compile_autogptq(checkpoint, directory, config)


def _choices(candidate: str) -> dict[str, str]:
    """Returns the checkpoint's choice for each question id, from its evaluation."""
    rows = read_rows(layout.answers(candidate))
    return {row["id"]: row["choice"] for row in rows if row.get("choice") is not None}
