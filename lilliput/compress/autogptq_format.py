"""Writes quantised checkpoints in AutoGPTQ's format, version 1, without rounding again.

Codes are packed along the inputs and zeros along the outputs, 32 at a time into as many 32-bit words as they have bits,
lowest bits first. Version 1 stores each zero minus one: at 3 bits in each number, otherwise in the whole word, so that
a zero of 0 borrows from its neighbour. Readers add it back in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lilliput
from lilliput.compress.grid import STORED, QuantisedWeight
from lilliput.config import QuantisationConfig

# Readers accept asymmetric codes only from a producer that packs zeros as described above: GPTQModel from this version.
_PRODUCERS = [f"lilliput:{lilliput.__version__}", "gptqmodel:0.9.0"]
_WORD = 32


def packed_tensors(codes: QuantisedWeight) -> dict[str, torch.Tensor]:
    """Returns the tensors of a layer by the end of their names, on the host.

    int32 `qweight` (inputs · bits / 32, outputs), `qzeros` (groups, outputs · bits / 32) and `g_idx` (inputs,); float16
    `scales` (groups, outputs).
    """
    bits, zeros = codes.bits, codes.zeros.int()
    ones = _pack(torch.ones(_WORD, 1, dtype=torch.int32, device=zeros.device), bits)
    packed = _pack((zeros - 1) & (2**bits - 1) if bits == 3 else zeros, bits)
    if bits != 3:
        packed = packed - ones.repeat(len(packed) // len(ones) + 1, 1)[: len(packed)]  # in 32 bits, with borrowing
    tensors = {
        "qweight": _pack(codes.codes.T.int(), bits),
        "qzeros": packed.T,
        "scales": codes.scales.T.to(STORED),
        "g_idx": codes.groups.int(),
    }
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _pack(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs `numbers`, int32 (count, columns), into int32 (⌈count · bits / 32⌉, columns) words."""
    count, columns = numbers.shape
    numbers = pad(numbers, (0, 0, 0, -count % _WORD)).reshape(-1, _WORD, columns)
    words = numbers.new_zeros(len(numbers), bits, columns)
    for place in range(_WORD):
        word, shift = divmod(place * bits, _WORD)
        words[:, word] |= numbers[:, place] << shift
        if shift + bits > _WORD:
            words[:, word + 1] |= numbers[:, place] >> (_WORD - shift)
    return words.reshape(-1, columns)[: -(-count * bits // _WORD)]


def quantisation_settings(
    config: QuantisationConfig,
    *,
    bits: int | None = None,
    rules: Mapping[str, Any] | None = None,
    act_order: bool = False,
    meta: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the content of quantize_config.json.

    Args:
        config: the grid.
        bits, rules: the width of most layers, and settings of the others by name; the default is `config.bits`.
        act_order: whether the layers' groups are mixed.
        meta: how the codes were found, for people.
    """
    return {
        "bits": bits or config.bits,
        **({"dynamic": dict(rules)} if rules else {}),
        "group_size": config.group_size,
        "desc_act": act_order,
        "sym": config.symmetric,
        "lm_head": False,
        "method": "gptq",
        "quant_method": "gptq",
        "format": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        # Without these two keys, GPTQModel creates a temporary folder when it opens the checkpoint.
        "meta": {"quantizer": _PRODUCERS, "offload_to_disk": False, "offload_to_disk_path": None, **(meta or {})},
    }


def write_checkpoint(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    packed: Mapping[str, Mapping[str, torch.Tensor]],
    settings: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Writes a quantised checkpoint in AutoGPTQ's format to the folder `target`; arguments as for `write_packed`."""
    write_packed(target, model, tokenizer, packed, settings, dtype)
    (target / "quantize_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def write_packed(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    packed: Mapping[str, Mapping[str, torch.Tensor]],
    settings: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Writes a checkpoint with packed weights to the folder `target`.

    Args:
        model: the weights of its layers named in `packed` are left out; the other tensors are written in `dtype`.
        tokenizer: is written as well.
        packed: tensors by layer and by the end of their names.
        settings: `quantization_config` of config.json.
        dtype: of the float tensors.
    """
    weights = {f"{name}.weight" for name in packed}
    state = {
        name: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor
        for name, tensor in _distinct(model.state_dict()).items()
        if name not in weights
    }
    state |= {f"{name}.{part}": tensor for name, parts in packed.items() for part, tensor in parts.items()}
    model.save_pretrained(target, state_dict=state, safe_serialization=True)
    tokenizer.save_pretrained(target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": settings}
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _distinct(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors of `state` without those that share the memory of an earlier one (tied embeddings)."""
    seen: dict[int, str] = {}
    return {name: tensor for name, tensor in state.items() if seen.setdefault(tensor.data_ptr(), name) == name}
