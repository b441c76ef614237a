"""Compiles for ONNX Runtime GenAI; its builder keeps the codes of an AutoGPTQ checkpoint unchanged."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lilliput.chat.template import end_ids, read_generation_config
from lilliput.codes import read_codes
from lilliput.config import OnnxTarget
from lilliput.errors import CompileError
from lilliput.redaction import environment_without_secrets
from lilliput.untrusted import require_harmless

_BITS = {4: "int4", 8: "int8"}


def compile_onnx(checkpoint: Path, target: Path, config: OnnxTarget) -> dict[str, Any]:
    """Writes a model for ONNX Runtime GenAI into the folder `target`.

    Quantised layers keep their codes. The embedding table, which is also the output layer, is rounded to
    `config.embeddings`. A float checkpoint stays in float32.

    Returns:
        Facts for the manifest.

    Raises:
        CompileError: the builder does not support this architecture or grid, or exceeds its deadline.
        ArtifactError: the checkpoint contains code.
    """
    require_harmless(checkpoint)
    layers = dict(read_codes(checkpoint))
    bits = {codes.bits for codes in layers.values()}
    if len(bits) > 1 or bits - _BITS.keys():
        raise CompileError(
            f"{checkpoint}: layers of {', '.join(map(str, sorted(bits)))} bits; ONNX Runtime's builder takes 4 or 8, "
            "the same for all layers"
        )
    precision = _BITS[bits.pop()] if bits else "fp32"
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(target)]
        command += ["-p", precision, "-e", "cpu", "-c", scratch, "--extra_options", "hf_token=false"]
        if layers:
            sizes = {codes.group_size for codes in layers.values()}
            command += [f"block_size={min(sizes)}", "accuracy_level=4", "algo_config=rtn"]
            if precision == "int4":
                command.append(f"matmul_mixed_precision=last_matmul:{config.embeddings}")
        _run_builder(command, checkpoint, config.deadline_s)
    settings = json.loads((target / "genai_config.json").read_text(encoding="utf-8"))
    settings["search"] |= {"do_sample": False}  # evaluation decodes greedily
    settings["model"]["eos_token_id"] = _end_ids(checkpoint)
    (target / "genai_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return {"precision": precision, "embeddings": config.embeddings if layers else "fp32", "code_layers": len(layers)}


def _end_ids(checkpoint: Path) -> int | list[int]:
    """Returns every token that ends an answer; the builder itself ignores generation_config.json."""
    ends = end_ids(AutoTokenizer.from_pretrained(checkpoint), read_generation_config(checkpoint))
    return ends if len(ends) > 1 else ends[0]


def _run_builder(command: list[str], checkpoint: Path, deadline_s: float) -> None:
    try:
        process = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=deadline_s,
            stdin=subprocess.DEVNULL,
            env=environment_without_secrets() | {"HF_HUB_OFFLINE": "1"},
        )
    except subprocess.TimeoutExpired:
        raise CompileError(f"{checkpoint}: ONNX Runtime's builder did not finish within {deadline_s:g} s") from None
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise CompileError(
            f"{checkpoint}: ONNX Runtime's builder does not support this model; compile it with `target: gguf` "
            f"instead. The builder's message: {last}"
        )
