"""GGUF for llama.cpp: a quantised checkpoint's codes and scales are carried over as they are, the rest is converted.

Names, hyper-parameters, tokenizer and the order of rows are llama.cpp's own converter's business; here is only what it
does not do: it would turn the codes into floats and lose them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoTokenizer

from lilliput.chat.template import end_id, end_ids, read_generation_config
from lilliput.compile.codes import PARTS, Codes, read_codes
from lilliput.config import GgufTarget
from lilliput.errors import CompileError
from lilliput.untrusted import require_harmless

if TYPE_CHECKING:
    from conversion.base import TextModel as _Converter
else:
    _Converter = object  # the architecture's own converter is chosen when its checkpoint is known

FILE = "model.gguf"
BLOCK = 32  # weights that share a scale in all types used here
_FLOATS = {Type.F32, Type.F16, Type.BF16}


def compile_gguf(checkpoint: Path, target: Path, config: GgufTarget) -> dict[str, Any]:
    """Writes `target`/model.gguf and tells what became of each tensor.

    Args:
        checkpoint: a model that transformers opens, in float or in AutoGPTQ's format.
        target: an existing folder.
        config: the types of what is not quantised already.

    Returns:
        The type of each tensor, how many there are of each, and `largest_weight_difference` between a quantised
        layer's weights there and here, relative to its scale (0 but for offsets rounded to float16).

    Raises:
        CompileError: the architecture is unknown to llama.cpp, or a layer's codes have no type that holds them.
        ArtifactError: the checkpoint would run code of its own.
    """
    # The converter trusts the code that some tokenizers name.
    require_harmless(checkpoint)
    if not any(checkpoint.glob("*.safetensors")):
        raise CompileError(f"{checkpoint}: no safetensors here, and pickled weights are never opened")
    converter = _converter(checkpoint)
    with torch.inference_mode():
        model = converter(checkpoint, gguf.LlamaFileType.ALL_F32, target / FILE, eager=True, model_name=checkpoint.name)
        model.packed = dict(read_codes(checkpoint))
        model.settings = config
        try:
            model.write()
        except (NotImplementedError, FileNotFoundError, KeyError, ValueError) as error:
            raise CompileError(f"{checkpoint}: llama.cpp's converter does not take this model: {error}") from error
    types = model.types
    return {
        "tensors": {name: kind.name for name, kind in sorted(types.items())},
        "tensors_by_type": dict(sorted(Counter(kind.name for kind in types.values()).items())),
        "largest_weight_difference": model.largest_difference,
    }


def encode(codes: Codes) -> tuple[Type, np.ndarray]:
    """The codes as GGUF's blocks of 32, and their type: Q4_0 (symmetric), Q4_1 (asymmetric) or Q8_0 (8 bits).

    Up to four bits fit into four. Q4_1 holds the offset −scale · zero where the checkpoint holds the zero; it is
    rounded to float16, by less than 15 · 2⁻¹² of a step of the grid.

    Raises:
        CompileError: groups do not consist of whole blocks, or 8-bit codes lie too far from their zero.
    """
    if codes.group_size % BLOCK:
        raise CompileError(
            f"group_size {codes.group_size}: GGUF's blocks hold {BLOCK} weights; quantise in groups of 32"
        )
    codes = codes.in_groups_of(BLOCK)
    outputs, groups = codes.scales.shape
    blocks = codes.codes.reshape(outputs, groups, BLOCK)
    head = [codes.scales[..., None].view(np.uint8)]
    if codes.bits == 8:
        centred = blocks.astype(np.int16) - codes.zeros[..., None]
        if centred.min() < -128 or centred.max() > 127:
            raise CompileError(
                "8-bit codes around zeros of their own have no type in GGUF, which has one zero for all; "
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
    """Two codes a byte: the first half of a block in the low bits, the second half in the high ones."""
    return blocks[..., : BLOCK // 2] | (blocks[..., BLOCK // 2 :] << 4)


def _converter(checkpoint: Path) -> type[Any]:
    """llama.cpp's converter of the checkpoint's architecture, taught to carry codes over."""
    from conversion.base import ModelBase, ModelType, get_model_architecture

    hparams = ModelBase.load_hparams(checkpoint, False)
    architecture = get_model_architecture(hparams, ModelType.TEXT)
    base = _imported(architecture)
    if base is None:
        raise CompileError(f"{checkpoint}: llama.cpp's converter does not know {architecture}")
    return type("CodeConverter", (_CarriesCodes, base), {"model_arch": base.model_arch})


def _imported(architecture: str) -> type[Any] | None:
    """The converter's class for `architecture`; None where it has none.

    It is released apart from gguf and names a few families that the released gguf does not know yet. Those are given an
    empty name, so that the modules they share with others can be imported; none of them can be converted.
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


class _CarriesCodes(_Converter):
    """What an architecture's converter is taught: tensors of types of our choosing, and codes as they are."""

    packed: dict[str, Codes]
    settings: GgufTarget

    def prepare_tensors(self) -> None:
        self.types: dict[str, Type] = {}
        self.largest_difference = 0.0
        quantised = tuple(f"{layer}.{part}" for layer in self.packed for part in PARTS)
        floats = (item for item in self.get_tensors() if item[0] not in quantised)
        for name, tensor in chain(self.generate_extra_tensors(), floats):
            for new_name, changed in self._renamed(name, tensor.float()):
                self._add(new_name, *_as_stored(new_name, changed.numpy(), self._kind(new_name, changed)))
        for layer, codes in self.packed.items():
            self._add_codes(f"{layer}.weight", codes)

    def _add_codes(self, name: str, codes: Codes) -> None:
        parts = (codes.codes, codes.scales, codes.zeros, codes.weight())
        moved = [list(self._renamed(name, torch.from_numpy(part.astype(np.float32)))) for part in parts]
        if any(len(tensors) != 1 for tensors in moved):
            raise CompileError(f"{name}: llama.cpp wants this layer in parts, and codes are not split")
        new_name = moved[0][0][0]
        rows = [tensors[0][1].numpy() for tensors in moved]
        carried = Codes(rows[0].astype(np.uint8), rows[1].astype(np.float16), rows[2].astype(np.uint8), codes.bits)
        if not np.array_equal(carried.weight(), rows[3]):
            raise CompileError(f"{name}: llama.cpp's form of this layer is more than another order of its rows")
        try:
            kind, data = encode(carried)
        except CompileError as error:
            raise CompileError(f"{name}: {error}") from None
        there = gguf.quants.dequantize(data, kind).reshape(carried.codes.shape[0], -1, carried.group_size)
        step = np.abs(there - carried.weight().reshape(there.shape)) / carried.scales[..., None].astype(np.float32)
        self.largest_difference = max(self.largest_difference, float(np.nan_to_num(step).max()))
        self._add(new_name, kind, data)

    def _renamed(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """`tensor` under llama.cpp's name, its rows in llama.cpp's order."""
        block = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        return self.modify_tensors(tensor, name, block)

    def _kind(self, name: str, tensor: torch.Tensor) -> Type:
        if tensor.dim() <= 1 or name.endswith("_norm.weight") or "ffn_gate_inp" in name:
            return Type.F32  # norms, biases and routers: next to nothing in size, and llama.cpp wants them so
        outside = name.startswith(("token_embd", "output"))
        return Type[(self.settings.embeddings if outside else self.settings.floats).upper()]

    def _add(self, name: str, kind: Type, data: np.ndarray) -> None:
        self.types[name] = kind
        self.gguf_writer.add_tensor(name, data, raw_dtype=kind)

    def set_vocab(self) -> None:
        """A carved mixture keeps its parent's tokenizer, which the converter's reader for GLM does not take."""
        vocabulary = (self.dir_model / "tokenizer.json").read_text(encoding="utf-8")
        if self.hf_arch == "Glm4MoeForCausalLM" and "[gMASK]" not in vocabulary:
            self._set_vocab_gpt2()
        else:
            super().set_vocab()
        self._name_special_tokens()
        self._rank_tokens()

    def _rank_tokens(self) -> None:
        """Writes scores by the order of merges for a SentencePiece vocabulary, all of which the converter scores alike.

        llama.cpp joins pieces by the score of what they make, so equal scores make other tokens than the checkpoint's.
        """
        fields = {name: field.value for values in self.gguf_writer.kv_data for name, field in values.items()}
        if len(set(fields.get("tokenizer.ggml.scores", ()))) != 1:
            return
        model = json.loads((self.dir_model / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(model["merges"]):
            ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
        texts = [text.decode() if isinstance(text, bytes) else text for text in fields["tokenizer.ggml.tokens"]]
        self.gguf_writer.add_token_scores([-float(ranks.get(text, len(ranks))) for text in texts])

    def _name_special_tokens(self) -> None:
        """Writes which tokens end an answer, and that llama.cpp and Ollama add none to a prompt.

        The chat template writes the BOS token by itself where the model wants one, as in training and evaluation.
        """
        tokenizer = AutoTokenizer.from_pretrained(self.dir_model)
        ends = end_ids(tokenizer, read_generation_config(self.dir_model))
        # llama.cpp's template engine reads `eos_token` from the first key, so it stays the tokenizer's own.
        first = cast("int", tokenizer.eos_token_id if tokenizer.eos_token_id is not None else ends[0])
        others = [end for end in ends if end != first]
        others.sort(key=lambda end: end != end_id(tokenizer))
        if len(others) > 2:
            names = ", ".join(map(str, cast("Any", tokenizer).convert_ids_to_tokens(ends)))
            raise CompileError(
                f"{self.dir_model}: {len(ends)} tokens end an answer ({names}), and GGUF has room for three; remove "
                "those that the model never writes from `eos_token_id` in the source's generation_config.json"
            )
        self.gguf_writer.add_eos_token_id(first)
        for add, end in zip(
            (self.gguf_writer.add_eot_token_id, self.gguf_writer.add_eom_token_id), others, strict=False
        ):
            add(end)
        self.gguf_writer.add_add_bos_token(False)
        for name in ("eos", "sep"):  # absent means no
            if any(f"tokenizer.ggml.add_{name}_token" in values for values in self.gguf_writer.kv_data):
                getattr(self.gguf_writer, f"add_add_{name}_token")(False)

    def set_type(self) -> None:
        sizes = Counter(kind for kind in self.types.values() if kind is not Type.F32)
        kind = max(sizes or {Type.F32: 1}, key=lambda kind: sizes[kind])
        name = "ALL_F32" if kind is Type.F32 else f"MOSTLY_{kind.name}"
        self.ftype = gguf.LlamaFileType[name]
        super().set_type()


def _as_stored(name: str, data: np.ndarray, kind: Type) -> tuple[Type, np.ndarray]:
    """`data` in `kind`, or in float16 where its rows are no whole blocks."""
    if kind not in _FLOATS and data.shape[-1] % BLOCK:
        kind = Type.F16
    if kind is Type.F16 and np.abs(data).max() > np.finfo(np.float16).max:
        raise CompileError(f"{name}: values beyond float16; choose bf16 or f32")
    return kind, gguf.quants.quantize(data, kind)
