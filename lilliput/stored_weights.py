"""Frozen layers whose weights stay in the checkpoint's file and dtype; each is widened to float32 for its product.

Widening bfloat16 or float16 to float32 is exact, so the results are those of a model opened in float32, to the bit.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import embedding, linear
from torch.nn.modules.module import register_module_parameter_registration_hook

from lilliput.resident import release_memory

_SCRATCH_WEIGHTS = 32 * 2**20 // 4
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32}


class _File:
    """An open file, whose content stays the same if another file takes its path; closed with the last reference."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file; `offset` is the position of its first byte in `file`."""

    file: _File
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        """Maps the tensor into memory; its pages are given back when the result is dropped."""
        count = math.prod(self.shape)
        start = self.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = self.offset - start + count * self.dtype.itemsize
        mapped = mmap.mmap(self.file.descriptor, length, access=mmap.ACCESS_COPY, offset=start)
        return torch.frombuffer(mapped, dtype=self.dtype, count=count, offset=self.offset - start).view(self.shape)

    def as_tensor(self) -> torch.Tensor:
        """Maps the tensor for as long as the result lives; `tensor_of` reads it without keeping its pages."""
        tensor: Any = self.read()
        tensor.stored_tensor = self
        return tensor


class _Stored(torch.nn.Module):
    """A module whose parameter `weight` is kept as stored, and whose attribute `weight` is a float32 copy of it.

    Assign a parameter to `weight` to change it: changes of the copy are lost. `parameters()` and `state_dict()` have
    the weight as stored.
    """

    @property
    def weight(self) -> torch.Tensor:
        """A new float32 copy of the weight."""
        return self.as_stored().float()

    def as_stored(self) -> torch.Tensor:
        """Returns the weight in the dtype in which it is kept."""
        return as_stored(self)


class _Scratch(threading.local):
    """Memory for a widened weight, used again for the next one.

    glibc takes blocks of up to 32 MiB from its heap, and activations that are kept in between would leave the freed
    blocks too small for the next weight. Larger blocks are returned to the system at once.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def widened(self, layer: StoredLinear) -> torch.Tensor:
        """Returns the weight of `layer` in float32, until the next call."""
        weight = layer.as_stored()
        if weight.dtype == torch.float32 or weight.device.type != "cpu" or weight.numel() > _SCRATCH_WEIGHTS:
            return weight.float()
        if len(self.memory) < weight.numel():
            with torch.inference_mode(False):  # usable in every mode
                self.memory = torch.empty(weight.numel())
        return self.memory[: weight.numel()].view(weight.shape).copy_(weight)


_SCRATCH = _Scratch()


class _Product(torch.autograd.Function):
    """The product of a stored layer; the backward pass widens the weight again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, layer: StoredLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, states.dtype
        rounds = torch.is_autocast_enabled(states.device.type)  # rounds the weight itself
        return linear(states, layer.as_stored() if rounds else _SCRATCH.widened(layer), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        exact = gradient.dtype == torch.float32
        weight = _SCRATCH.widened(ctx.layer) if exact else ctx.layer.as_stored().to(gradient.dtype)
        return (gradient @ weight).to(ctx.dtype), None


class StoredLinear(_Stored, torch.nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride] - a copy, see above
    """A frozen linear layer whose weight is kept as stored."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the outputs, float32 (…, outputs), or in autocast's dtype."""
        return cast("torch.Tensor", _Product.apply(input, self))


class StoredEmbedding(_Stored, torch.nn.Embedding):  # pyright: ignore[reportIncompatibleVariableOverride] - likewise
    """A frozen embedding whose table is kept as stored."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the rows of the ids `input`, float32 (…, size)."""
        return embedding(input, self.as_stored()).float()


_KINDS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Linear: StoredLinear,
    torch.nn.Embedding: StoredEmbedding,
}
_PLAIN = {stored: plain for plain, stored in _KINDS.items()}


def as_stored(module: torch.nn.Module) -> torch.Tensor:
    """Returns the weight of `module` in the dtype in which it is kept, mapped anew if it is in a file."""
    return tensor_of(cast("torch.Tensor", module._parameters["weight"]))


def tensor_of(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the values of `parameter`: mapped anew if they are in a file, so that their pages are given back."""
    place: StoredTensor | None = getattr(parameter, "stored_tensor", None)
    in_file = place and place.shape == parameter.shape and parameter.device.type == "cpu"
    return place.read().to(parameter.dtype) if place and in_file else parameter.detach()


def shares_weight(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two modules have one weight (tied embeddings)."""
    return one._parameters["weight"] is other._parameters["weight"]


def keep_as_stored(model: torch.nn.Module) -> None:
    """Makes `model` compute in float32 with matrices as they are: those of linear layers and embeddings.

    Other parameters (norms, biases, experts) are few or stacked; they become float32. Subclasses of the two kinds of
    module become float32 as well, because their formula may depend on the dtype of the weight.
    """
    for module in model.modules():
        weight = module._parameters.get("weight")
        if type(module) in _KINDS and weight is not None and weight.dtype != torch.float32:
            module.__class__ = _KINDS[type(module)]
            weight.requires_grad = False
    kept = {id(module._parameters["weight"]) for module in model.modules() if type(module) in _PLAIN}
    for parameter in model.parameters():  # not the buffers, see saving.save_model
        if id(parameter) not in kept:
            parameter.data = parameter.data.float()


def release_weights(model: torch.nn.Module) -> None:
    """Frees the memory of all parameters and buffers of `model`, which is of no use afterwards."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)
    release_memory()


@contextmanager
def widened(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Makes stored layers ordinary float32 layers for the length of a block, then rounds them to their dtype.

    Inside the block their weights can be changed in place; tied layers stay tied.
    """
    layers = [(module, cast("Any", module._parameters["weight"])) for module in modules if type(module) in _PLAIN]
    for module, _ in layers:
        copy = torch.nn.Parameter(cast("torch.Tensor", module.weight), requires_grad=False)
        module.__class__ = _PLAIN[type(module)]
        module.weight = copy
    try:
        yield
    finally:
        for module, parameter in layers:
            vars(parameter).pop("stored_tensor", None)
            parameter.data = cast("torch.Tensor", module.weight).detach().to(parameter.dtype)
            module.weight = parameter
            module.__class__ = _KINDS[type(module)]


@contextmanager
def matrices_created_in(dtype: torch.dtype) -> Iterator[None]:
    """Gives linear layers and embeddings that are created in the block a weight of `dtype`."""

    def register(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> Any:
        if name == "weight" and type(module) in _KINDS and parameter is not None and parameter.dtype != dtype:
            return torch.nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        return None

    with register_module_parameter_registration_hook(register):
        yield


def point_to_files(model: torch.nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Lets the stored layers of `model` read their weights from the files in which `stored` has them, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        parameter: Any = module._parameters.get("weight")
        place = stored.get(names.get(id(parameter), ""))
        if type(module) in _PLAIN and place and (place.shape, place.dtype) == (tuple(parameter.shape), parameter.dtype):
            parameter.stored_tensor = place


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Returns the float and int32 tensors of the safetensors files in `directory` by name."""
    if sys.byteorder != "little":  # the files are; such a machine keeps the tensors that the library has read
        return {}
    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in _tensors_of(path)}


def matrix_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """Returns the dtype that all matrices of `stored` have; float32 if they differ."""
    dtypes = {tensor.dtype for tensor in stored.values() if len(tensor.shape) > 1}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _tensors_of(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    file = _File(path)
    length = int.from_bytes(os.pread(file.descriptor, 8, 0), "little")
    for name, entry in json.loads(os.pread(file.descriptor, length, 8)).items():
        if name != "__metadata__" and entry["dtype"] in _DTYPES:
            offset = 8 + length + entry["data_offsets"][0]
            yield name, StoredTensor(file, offset, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
