"""Compiles to GGUF for llama.cpp: copies the codes and scales of a quantised checkpoint, converts everything else.

llama.cpp's own converter handles names, hyperparameters, tokenizer and the order of rows. By itself it would dequantise
the codes to floats; this module keeps them.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoTokenizer

from lilliput.artifacts import GGUF
from lilliput.chat.template import end_id, end_ids, read_generation_config
from lilliput.codes import PARTS, Codes, read_codes
from lilliput.compile.pieces import read_pieces
from lilliput.config import GgufTarget
from lilliput.errors import CompileError
from lilliput.ggml.blocks import PART as BLOCKS
from lilliput.ggml.blocks import Blocks, has_blocks, read_blocks, type_of_file
from lilliput.untrusted import require_harmless

if TYPE_CHECKING:
    from conversion.base import TextModel as _Converter
else:
    _Converter = object  # replaced by the converter of the checkpoint's architecture at run time

BLOCK = 32  # weights per scale in all types used here
_FLOATS = {Type.F32, Type.F16, Type.BF16}


def compile_gguf(checkpoint: Path, target: Path, config: GgufTarget) -> dict[str, Any]:
    """Writes `target`/model.gguf.

    Args:
        checkpoint: a model in float, in AutoGPTQ's format or in GGUF's types.
        target: an existing folder.
        config: the types of tensors that are not quantised yet.

    Returns:
        `tensors` (type of each), `tensors_by_type` (counts), and `largest_weight_difference`: between the weights of a
        quantised layer in the checkpoint and in the file, relative to its scale (0 except for offsets rounded to
        float16).

    Raises:
        CompileError: llama.cpp does not know the architecture, or no type holds a layer's codes.
        ArtifactError: the checkpoint contains code.
    """
    # The converter runs code that a tokenizer names.
    require_harmless(checkpoint)
    if not any(checkpoint.glob("*.safetensors")):
        raise CompileError(
            f"{checkpoint}: no safetensors file; pickled weights are never opened, convert them to safetensors"
        )
    converter = _make_converter(checkpoint)
    with torch.inference_mode():
        model = converter(checkpoint, gguf.LlamaFileType.ALL_F32, target / GGUF, eager=True, model_name=checkpoint.name)
        model.settings = config
        try:
            with tempfile.TemporaryFile(dir=target) as converted:
                model.converted = converted
                model.write()
        except (AssertionError, NotImplementedError, FileNotFoundError, KeyError, ValueError) as error:
            reason = str(error) or f"a check of its own fails ({type(error).__name__})"
            raise CompileError(
                f"{checkpoint}: llama.cpp's converter does not support this model: {reason}; compile it with "
                "`target: onnx` instead, or choose a model of another family (docs/models.md)"
            ) from error
    types = model.types
    return {
        "tensors": {name: kind.name for name, kind in sorted(types.items())},
        "tensors_by_type": dict(sorted(Counter(kind.name for kind in types.values()).items())),
        "largest_weight_difference": model.largest_difference,
    }


def encode(codes: Codes) -> tuple[Type, np.ndarray]:
    """Returns the GGUF type and its blocks of 32 weights: Q4_0 (symmetric), Q4_1 (asymmetric) or Q8_0 (8 bits).

    Codes of 2 to 4 bits are stored in 4 bits. Q4_1 stores the offset −scale · zero instead of the zero, rounded to
    float16: an error below 15 · 2⁻¹² of a step of the grid.

    Raises:
        CompileError: the group size is not a multiple of 32, or asymmetric 8-bit codes do not fit into int8.
    """
    if codes.group_size % BLOCK:
        raise CompileError(
            f"group_size {codes.group_size}: must be a multiple of GGUF's blocks of {BLOCK} weights; "
            "quantise in groups of 32"
        )
    codes = codes.in_groups_of(BLOCK)
    outputs, groups = codes.scales.shape
    blocks = codes.codes.reshape(outputs, groups, BLOCK)
    head = [codes.scales[..., None].view(np.uint8)]
    if codes.bits == 8:
        centred = blocks.astype(np.int16) - codes.zeros[..., None]
        if centred.min() < -128 or centred.max() > 127:
            raise CompileError(
                "GGUF has no type for asymmetric 8-bit codes: its zero is the same for all weights; "
                "quantise with symmetric: true"
            )
        kind, body = Type.Q8_0, centred.astype(np.int8).view(np.uint8)
    elif codes.symmetric:
        kind, body = Type.Q4_0, _nibbles(blocks + np.uint8(8 - (1 << (codes.bits - 1))))
    else:
        offsets = -(codes.scales.astype(np.float32) * codes.zeros).astype(np.float16)
        kind, body = Type.Q4_1, _nibbles(blocks)
        head.append(offsets[..., None].view(np.uint8))
    return kind, np.concatenate([*head, body], axis=-1).reshape(outputs, -1)


def _nibbles(blocks: np.ndarray) -> np.ndarray:
    """Packs two codes per byte: the first half of a block in the low bits, the second half in the high bits."""
    return blocks[..., : BLOCK // 2] | (blocks[..., BLOCK // 2 :] << 4)


def _make_converter(checkpoint: Path) -> type[Any]:
    """Returns llama.cpp's converter class for the checkpoint's architecture, extended to keep codes."""
    from conversion.base import ModelBase, ModelType, get_model_architecture

    hparams = ModelBase.load_hparams(checkpoint, False)
    architecture = get_model_architecture(hparams, ModelType.TEXT)
    base = _import_converter(architecture)
    if base is None:
        raise CompileError(f"{checkpoint}: llama.cpp's converter does not know {architecture}")
    return type("CodeConverter", (_KeepsCodes, base), {"model_arch": base.model_arch})


def _import_converter(architecture: str) -> type[Any] | None:
    """Returns the converter's class for `architecture`; None if there is none.

    The converter is released separately from gguf and refers to families that the released gguf does not know yet. Such
    names become None, so that modules shared with other families can be imported; these families cannot be converted.
    """
    from conversion import get_model_class  # takes seconds

    while True:
        try:
            return get_model_class(architecture)
        except NotImplementedError:
            return None
        except AttributeError as error:
            if error.name is None or error.obj not in (gguf.MODEL_ARCH, gguf.MODEL_TENSOR):
                raise
            setattr(error.obj, error.name, None)


class _KeepsCodes(_Converter):
    """Extends an architecture's converter: chooses the type of each tensor, and keeps codes."""

    converted: IO[bytes]  # holds the tensors until the header, which comes first in the file, is known
    settings: GgufTarget

    def prepare_tensors(self) -> None:
        self.types: dict[str, Type] = {}
        self.largest_difference = 0.0
        suffix = f".{PARTS[0]}"
        layers = [name.removesuffix(suffix) for name in self.model_tensors if name.endswith(suffix)]
        quantised = {f"{layer}.{part}" for layer in layers for part in PARTS}
        quantised |= {name for name in self.model_tensors if name.endswith(f".{BLOCKS}")}
        floats = ((name, read()) for name, read in self.model_tensors.items() if name not in quantised)
        for name, tensor in chain(self.generate_extra_tensors(), floats):
            for new_name, changed in self._rename(name, tensor.float()):
                self._add(new_name, *_convert(new_name, changed.numpy(), self._kind(new_name, changed)))
        self.keeps_blocks = has_blocks(self.dir_model)
        if self.keeps_blocks:
            for layer, blocks in read_blocks(self.dir_model):
                self._add_blocks(f"{layer}.weight", blocks)
            return
        for layer, codes in read_codes(self.dir_model):
            self._add_codes(f"{layer}.weight", codes)

    def _add_blocks(self, name: str, blocks: Blocks) -> None:
        """Adds blocks as they are, at most their rows in another order."""
        new_name, moved = self._move_rows(name, [blocks.data, blocks.weight()])
        data = moved[0].astype(np.uint8)
        if not np.array_equal(Blocks(data, blocks.kind).weight(), moved[1]):
            raise CompileError(
                f"{name}: llama.cpp changes more than the order of this layer's rows, so its blocks cannot be kept"
            )
        self._add(new_name, blocks.kind, data)

    def _move_rows(self, name: str, parts: Iterable[np.ndarray]) -> tuple[str, list[np.ndarray]]:
        """Returns llama.cpp's name, and `parts`, arrays over the rows of tensor `name`, in llama.cpp's order.

        Raises:
            CompileError: llama.cpp splits the tensor.
        """
        moved = [list(self._rename(name, torch.from_numpy(part.astype(np.float32)))) for part in parts]
        if any(len(tensors) != 1 for tensors in moved):
            raise CompileError(f"{name}: llama.cpp splits this layer into several tensors, and codes cannot be split")
        return moved[0][0][0], [tensors[0][1].numpy() for tensors in moved]

    def _add_codes(self, name: str, codes: Codes) -> None:
        new_name, rows = self._move_rows(name, (codes.codes, codes.scales, codes.zeros, codes.weight()))
        reordered = Codes(rows[0].astype(np.uint8), rows[1].astype(np.float16), rows[2].astype(np.uint8), codes.bits)
        weight = reordered.weight()
        if not np.array_equal(weight, rows[3]):
            raise CompileError(
                f"{name}: llama.cpp changes more than the order of this layer's rows, so its codes cannot be kept"
            )
        try:
            kind, data = encode(reordered)
        except CompileError as error:
            raise CompileError(f"{name}: {error}") from None
        stored = gguf.quants.dequantize(data, kind).reshape(reordered.codes.shape[0], -1, reordered.group_size)
        step = np.abs(stored - weight.reshape(stored.shape)) / reordered.scales[..., None].astype(np.float32)
        self.largest_difference = max(self.largest_difference, float(np.nan_to_num(step).max()))
        self._add(new_name, kind, data)

    def _rename(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """Yields `tensor` under llama.cpp's name, its rows in llama.cpp's order."""
        block = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        return self.modify_tensors(tensor, name, block)

    def _kind(self, name: str, tensor: torch.Tensor) -> Type:
        if tensor.dim() <= 1 or name.endswith("_norm.weight") or "ffn_gate_inp" in name:
            return Type.F32  # norms, biases and routers: small, and llama.cpp requires float32
        outside = name.startswith(("token_embd", "output"))
        return Type[(self.settings.embeddings if outside else self.settings.floats).upper()]

    def _add(self, name: str, kind: Type, data: np.ndarray) -> None:
        self.types[name] = kind
        if name == "token_embd.weight":
            self.rows = len(data)
        place = self.converted.tell()
        data.tofile(self.converted)
        mapped = np.memmap(self.converted, data.dtype, "r", place, data.shape)  # the writer drops it once it is copied
        self.gguf_writer.add_tensor(name, mapped, raw_dtype=kind)

    def set_vocab(self) -> None:
        """Writes the tokenizer."""
        pieces = read_pieces(self.dir_model)
        if pieces:
            pieces.write(self.gguf_writer, self.rows)
            gguf.SpecialVocab(self.dir_model, n_vocab=self.rows).add_to_gguf(self.gguf_writer)
        elif self._is_plain_byte_level():
            self._set_vocab_gpt2()
        else:
            super().set_vocab()
        self._name_special_tokens()

    def _is_plain_byte_level(self) -> bool:
        """Whether the family's own reader would reject a vocabulary over bytes.

        A mixture keeps its parent's, which the reader for GLM rejects. The reader for Phi recognises Phi-4's by a class
        of tokenizer that transformers does not store.
        """
        mixture = self.hf_arch == "Glm4MoeForCausalLM" and not self._has_token("[gMASK]")
        return mixture or self.hf_arch == "Phi3ForCausalLM"

    def _has_token(self, text: str) -> bool:
        return text in (self.dir_model / "tokenizer.json").read_text(encoding="utf-8")

    def _name_special_tokens(self) -> None:
        """Writes which tokens end an answer, and that no special token is added to a prompt.

        The chat template itself writes the BOS token where the model needs one, as in training and evaluation.
        """
        tokenizer = AutoTokenizer.from_pretrained(self.dir_model)
        ends = end_ids(tokenizer, read_generation_config(self.dir_model))
        # llama.cpp's template engine reads `eos_token` from the first key, so that key is the tokenizer's EOS.
        first = cast("int", tokenizer.eos_token_id if tokenizer.eos_token_id is not None else ends[0])
        others = [end for end in ends if end != first]
        others.sort(key=lambda end: end != end_id(tokenizer))
        if len(others) > 2:
            names = ", ".join(map(str, cast("Any", tokenizer).convert_ids_to_tokens(ends)))
            raise CompileError(
                f"{self.dir_model}: {len(ends)} tokens end an answer ({names}), but GGUF has room for three; remove "
                "those that the model never writes from `eos_token_id` in the source's generation_config.json"
            )
        self.gguf_writer.add_eos_token_id(first)
        for add, end in zip(
            (self.gguf_writer.add_eot_token_id, self.gguf_writer.add_eom_token_id), others, strict=False
        ):
            add(end)
        self.gguf_writer.add_add_bos_token(False)
        for name in ("eos", "sep"):  # an absent key means no
            if any(f"tokenizer.ggml.add_{name}_token" in values for values in self.gguf_writer.kv_data):
                getattr(self.gguf_writer, f"add_add_{name}_token")(False)

    def set_type(self) -> None:
        if self.keeps_blocks:
            self.ftype = gguf.LlamaFileType[f"MOSTLY_{type_of_file(self.dir_model)}"]
            super().set_type()
            return
        sizes = Counter(kind for kind in self.types.values() if kind is not Type.F32)
        kind = max(sizes or {Type.F32: 1}, key=lambda kind: sizes[kind])
        name = "ALL_F32" if kind is Type.F32 else f"MOSTLY_{kind.name}"
        self.ftype = gguf.LlamaFileType[name]
        super().set_type()


def _convert(name: str, data: np.ndarray, kind: Type) -> tuple[Type, np.ndarray]:
    """Returns `data` in the type `kind`, or in float16 if its rows are not whole blocks."""
    if kind not in _FLOATS and data.shape[-1] % BLOCK:
        kind = Type.F16
    if kind is Type.F16 and np.abs(data).max() > np.finfo(np.float16).max:
        raise CompileError(f"{name}: values exceed float16; choose bf16 or f32")
    return kind, gguf.quants.quantize(data, kind)
