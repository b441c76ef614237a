"""Exports a quantised checkpoint in the format that auto-gptq 0.7 and similar loaders open without changes.

transformers stores tied embeddings once, and auto-gptq then uses an output layer of zeros. transformers stores the
rotary base inside `rope_parameters`, where versions before 5 do not read it. This export writes both explicitly.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lilliput.codes import read_codes
from lilliput.config import AutogptqTarget
from lilliput.errors import CompileError
from lilliput.untrusted import require_harmless

_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja", "generation_config.json")


def compile_autogptq(checkpoint: Path, target: Path, _config: AutogptqTarget) -> dict[str, Any]:
    """Writes the checkpoint into the folder `target` in AutoGPTQ's format.

    Returns:
        Facts for the manifest.

    Raises:
        CompileError: the checkpoint is not quantised.
    """
    require_harmless(checkpoint)
    layers = dict(read_codes(checkpoint))
    if not layers:
        raise CompileError(f"{checkpoint}: not quantised, but auto-gptq opens quantised checkpoints only")
    files = sorted(checkpoint.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        config["tie_word_embeddings"] = False
    config["rope_theta"] = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
    config["torch_dtype"] = config["dtype"] = "float16"  # the dtype of auto-gptq's kernels
    floats = {name: t.to(torch.float16) if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}
    save_file(floats, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in {path.name for pattern in (*_TOKENIZER, "quantize_config.json") for path in checkpoint.glob(pattern)}:
        shutil.copyfile(checkpoint / name, target / name)
    return {"code_layers": len(layers), "output_layer": "explicit", "rope_theta": config["rope_theta"]}
