"""Reads the header of a GGUF file: architecture, hyperparameters and tensors. Rejects keys of unknown meaning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lilliput.errors import SourceError

# Key prefixes of descriptions, tokenizers and quantisation records: no layer depends on them.
_NO_HYPERPARAMETERS = frozenset({"GGUF", "general", "tokenizer", "quantize", "imatrix", "split", "mradermacher"})
USE_SAFETENSORS = "use the safetensors release of this model (source.model without source.file)"


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        file: the GGUF file.
        architecture: llama.cpp's name, such as `llama` or `qwen3`.
        settings: hyperparameters by key, without the prefix `<architecture>.`; arrays as lists.
        tensors: every tensor by name; their data is not read yet.
        has_chat_template: whether the tokenizer in the file has a chat template.
    """

    file: Path
    architecture: str
    settings: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]
    has_chat_template: bool = False


@contextmanager
def parsed_once() -> Iterator[None]:
    """Lets gguf parse a file and build an architecture's table of tensor names only once during the block.

    transformers parses the file for its tokenizer, its configuration and its weights, each time token by token in
    Python, and builds the table for each module of the model. The file must not change during the block.
    """
    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = _reader_cache(gguf.GGUFReader)  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals  # pyright: ignore[reportPrivateImportUsage]


def _reader_cache(reader: type[gguf.GGUFReader]) -> Any:
    """Returns a function like `reader`, for reading, with one result per file."""

    class PlainReader(reader):
        """Reads from a plain array: each of the hundred thousand slices of a memmap takes three times as long."""

        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, memmap: np.memmap) -> None:
            self._plain = memmap.view(np.ndarray)

        def _get_field_parts(
            self, orig_offs: int, raw_type: int
        ) -> tuple[int, list[np.ndarray], list[int], list[gguf.GGUFValueType]]:
            """Reads an array at once: gguf calls this function for each of a vocabulary's 262,144 elements."""
            if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order == "S":
                return super()._get_field_parts(orig_offs, raw_type)
            head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
            kind, count, start = gguf.GGUFValueType(int(head[0][0])), int(head[1][0]), orig_offs + 12
            types = [gguf.GGUFValueType.ARRAY, *([kind] if count else [])]
            if kind == gguf.GGUFValueType.STRING:
                parts, end = self._strings(start, count)
                return end - orig_offs, [*head, *parts], list(range(3, 3 + 2 * count, 2)), types
            scalar = self.gguf_scalar_to_np.get(kind)
            if scalar is None:
                return super()._get_field_parts(orig_offs, raw_type)
            values = self._get(start, scalar, count)
            parts = list(values.reshape(-1, 1))
            return 12 + values.nbytes, [*head, *parts], list(range(2, 2 + count)), types

        def _strings(self, start: int, count: int) -> tuple[list[np.ndarray], int]:
            """Returns length and bytes of each of `count` strings from `start`, and the place after the last one."""
            parts: list[np.ndarray] = []
            for _ in range(count):
                length = self._plain[start : start + 8].view(np.uint64)
                end = start + 8 + int(length[0])
                if end > len(self._plain):
                    raise ValueError("a text in the header ends after the file")
                parts += (length, self._plain[start + 8 : end])
                start = end
            return parts, start

    parse = cache(PlainReader)
    return lambda path: parse(Path(path).absolute())


def read_header(file: Path) -> Header:
    """Reads the header of `file`.

    Raises:
        SourceError: the file holds no language model, is part of a split file, or has a key or tensor type of unknown
            meaning. Errors of the GGUF reader itself pass through.
    """
    reader = gguf.GGUFReader(file)
    fields = reader.fields
    architecture = str(fields["general.architecture"].contents())
    _require_complete_model(file, fields)
    unknown = [key for key in fields if key.split(".")[0] not in {*_NO_HYPERPARAMETERS, architecture}]
    if unknown:
        raise SourceError(
            f"{file}: metadata of unknown meaning, which may change the model's results: {', '.join(unknown)}; "
            f"{USE_SAFETENSORS}, or remove the keys with gguf's own gguf_new_metadata"
        )
    prefix = f"{architecture}."
    settings = {key.removeprefix(prefix): field.contents() for key, field in fields.items() if key.startswith(prefix)}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _require_readable_types(file, tensors)
    has_template = any(key.startswith("tokenizer.chat_template") for key in fields)
    return Header(file, architecture, settings, tensors, has_template)


def dequantise_tensor(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Returns the dequantised values of `tensor`, float32."""
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def _require_complete_model(file: Path, fields: dict[str, Any]) -> None:
    kind = fields["general.type"].contents() if "general.type" in fields else "model"
    if kind != "model":
        raise SourceError(
            f"{file}: general.type is `{kind}`, not a model; choose the file that holds the language model"
        )
    parts = fields["split.count"].contents() if "split.count" in fields else 1
    if parts > 1:
        raise SourceError(
            f"{file}: one of {parts} parts of a split model (split.count); join them with `llama-gguf-split --merge`"
        )


def _require_readable_types(file: Path, tensors: dict[str, gguf.ReaderTensor]) -> None:
    """Dequantises one row of each tensor type; raises SourceError if gguf cannot."""
    first = {tensor.tensor_type: tensor for tensor in reversed(tensors.values())}
    for kind, tensor in first.items():
        try:
            gguf.quants.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
        except NotImplementedError:
            raise SourceError(
                f"{file}: {tensor.name} is stored as {kind.name}, which cannot be dequantised; choose a file in F16, "
                "BF16, Q8_0, Q4_0 or a K type such as Q4_K_M"
            ) from None
