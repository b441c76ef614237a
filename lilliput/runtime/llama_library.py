"""llama.cpp's C interface (llama.h) in xllamacpp's extension module: many sequences at once, with all logits.

xllamacpp's own interface answers one prompt at a time and returns no probability of a prompt's tokens. Its extension
module exports llama.h as well. Of the two structures with settings only the fields used here are named, at places that
are checked against the default values: a release that moves them is refused.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp

from lilliput.errors import ArtifactError

# From 64 tokens on, llama.cpp's attention on a processor takes another way that rounds differently (by up to 0.2 nats
# for likely tokens). With fewer, results do not depend on what is computed together, and equal those of an answer.
BATCH_TOKENS = 63
_SETTINGS_BYTES = 512  # more than either structure has; a function that takes one reads only its beginning
_N_CTX, _N_BATCH, _N_UBATCH, _N_SEQ_MAX = 0, 4, 8, 12
_FIRST_DEFAULTS = (512, 2048, 512, 1)
_FLAGS = bytes([0, 1, 1, 1, 1, 0])  # defaults of embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified
_ERROR_LEVEL = 4


class _Settings(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * _SETTINGS_BYTES),)


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_Floats = ctypes.POINTER(ctypes.c_float)
_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_POINTER, _INT, _BOOL, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_char_p
# Result and arguments of each function, as in llama.h.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "llama_log_set": (None, _Log, _POINTER),
    "llama_model_default_params": (_Settings,),
    "llama_context_default_params": (_Settings,),
    "llama_model_load_from_file": (_POINTER, _TEXT, _Settings),
    "llama_model_free": (None, _POINTER),
    "llama_model_get_vocab": (_POINTER, _POINTER),
    "llama_vocab_n_tokens": (_INT, _POINTER),
    "llama_vocab_is_eog": (_BOOL, _POINTER, _INT),
    "llama_token_to_piece": (_INT, _POINTER, _INT, _TEXT, _INT, _INT, _BOOL),
    "llama_init_from_model": (_POINTER, _POINTER, _Settings),
    "llama_free": (None, _POINTER),
    "llama_set_n_threads": (None, _POINTER, _INT, _INT),
    "llama_n_ctx": (ctypes.c_uint32, _POINTER),
    "llama_n_ctx_seq": (ctypes.c_uint32, _POINTER),
    "llama_n_batch": (ctypes.c_uint32, _POINTER),
    "llama_n_seq_max": (ctypes.c_uint32, _POINTER),
    "llama_get_memory": (_POINTER, _POINTER),
    "llama_memory_seq_rm": (_BOOL, _POINTER, _INT, _INT, _INT),
    "llama_batch_init": (_Batch, _INT, _INT, _INT),
    "llama_batch_free": (None, _Batch),
    "llama_decode": (_INT, _POINTER, _Batch),
    "llama_get_logits_ith": (_Floats, _POINTER, _INT),
}


@dataclass(frozen=True)
class Token:
    """A token to compute: its id, its position, the sequences that it belongs to, and whether its logits are needed."""

    id: int
    position: int
    sequences: Sequence[int]
    predicts: bool = False


class LlamaModel:
    """A GGUF file opened through llama.h.

    Args:
        file: the GGUF file.

    Raises:
        ArtifactError: llama.cpp cannot open the file, or this release of it has another interface.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.library = file, _library()
        self._model = self.library.llama_model_load_from_file(
            str(file).encode(), self.library.llama_model_default_params()
        )
        if not self._model:
            raise ArtifactError(f"{file}: llama.cpp does not open it; compile this candidate again")
        self.vocabulary = self.library.llama_model_get_vocab(self._model)
        self.tokens = int(self.library.llama_vocab_n_tokens(self.vocabulary))

    def close(self) -> None:
        """Frees the weights."""
        self.library.llama_model_free(self._model)

    def ends_answer(self, token: int) -> bool:
        """Whether an answer ends with this token."""
        return bool(self.library.llama_vocab_is_eog(self.vocabulary, token))

    def text(self, tokens: Sequence[int]) -> str:
        """Returns the text of `tokens`, without control tokens."""
        room = ctypes.create_string_buffer(1024)
        pieces = bytearray()
        for token in tokens:
            length = self.library.llama_token_to_piece(self.vocabulary, token, room, len(room), 0, False)
            if length < 0:
                raise ArtifactError(f"{self.file}: token {token} has a text of {-length} bytes")
            pieces += room.raw[:length]
        return pieces.decode("utf-8", errors="replace")

    def context(self, cells: int, sequences: int, threads: int) -> LlamaContext:
        """Returns a context with room for `cells` tokens of all `sequences` together."""
        cells = max(cells, BATCH_TOKENS + 1)
        settings = self.library.llama_context_default_params()
        for place, value in (
            (_N_CTX, cells),
            (_N_BATCH, BATCH_TOKENS + 1),
            (_N_UBATCH, BATCH_TOKENS + 1),
            (_N_SEQ_MAX, sequences),
        ):
            settings.bytes[place : place + 4] = list(struct.pack("<I", value))
        settings.bytes[bytes(settings.bytes).rindex(_FLAGS) + len(_FLAGS) - 1] = 1  # one cache for all sequences
        pointer = self.library.llama_init_from_model(self._model, settings)
        if not pointer:
            raise ArtifactError(f"{self.file}: llama.cpp makes no context of {cells} tokens; is there enough memory?")
        self.library.llama_set_n_threads(pointer, threads, threads)
        return LlamaContext(self, pointer, cells, sequences)


class LlamaContext:
    """Keys and values of up to `sequences` sequences; made by `LlamaModel.context`."""

    def __init__(self, model: LlamaModel, pointer: int, cells: int, sequences: int) -> None:
        self._model, self._library, self._pointer, self._sequences = model, model.library, pointer, sequences
        self._batch = self._library.llama_batch_init(BATCH_TOKENS, 0, sequences)
        self._memory = self._library.llama_get_memory(pointer)
        actual = [getattr(self._library, f"llama_n_{name}")(pointer) for name in ("ctx", "ctx_seq", "seq_max", "batch")]
        if actual[0] < cells or actual[1:] != [actual[0], sequences, BATCH_TOKENS + 1]:
            self.close()
            raise _unknown_layout(f"context, sequence, sequences and batch are {actual}")

    def close(self) -> None:
        """Frees the keys and values."""
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._pointer)

    def forget(self, start: int) -> None:
        """Removes the tokens from position `start` on, in all sequences."""
        for sequence in range(self._sequences):
            self._library.llama_memory_seq_rm(self._memory, sequence, start, -1)

    def compute(self, tokens: Sequence[Token]) -> list[np.ndarray]:
        """Returns the logits of the tokens that need them, float32 of shape (vocabulary,), in their order.

        A token attends to all tokens of its sequences with smaller positions, which must have been computed.

        Raises:
            ArtifactError: llama.cpp refuses the tokens, or a logit is not a number.
        """
        logits: list[np.ndarray] = []
        for start in range(0, len(tokens), BATCH_TOKENS):
            logits += self._compute_batch(tokens[start : start + BATCH_TOKENS])
        return logits

    def _compute_batch(self, tokens: Sequence[Token]) -> list[np.ndarray]:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token.id, token.position
            batch.n_seq_id[place], batch.logits[place] = len(token.sequences), token.predicts
            for number, sequence in enumerate(token.sequences):
                batch.seq_id[place][number] = sequence
        if status := self._library.llama_decode(self._pointer, batch):
            raise ArtifactError(f"{self._model.file}: llama.cpp does not compute a text (llama_decode: {status})")
        return [self._logits(place) for place, token in enumerate(tokens) if token.predicts]

    def _logits(self, place: int) -> np.ndarray:
        values = self._library.llama_get_logits_ith(self._pointer, place)
        logits = np.ctypeslib.as_array(values, (self._model.tokens,)).copy()
        if not np.isfinite(logits).all():
            raise ArtifactError(f"{self._model.file}: a logit is NaN or infinite; compile this candidate again")
        return logits


@cache
def _library() -> Any:
    """Returns xllamacpp's extension module with the functions of llama.h.

    Raises:
        ArtifactError: it does not export them, or its settings are at other places.
    """
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    for name, (result, *arguments) in _FUNCTIONS.items():
        if (function := getattr(library, name, None)) is None:
            raise _unknown_layout(f"there is no {name}")
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_print_error, None)
    settings = bytes(library.llama_context_default_params().bytes)
    if struct.unpack_from("<4I", settings) != _FIRST_DEFAULTS or settings.count(_FLAGS) != 1:
        raise _unknown_layout("the default settings are not the known ones")
    return library


@_Log
def _print_error(level: int, text: bytes, _data: int | None) -> None:
    if level == _ERROR_LEVEL:
        print(text.decode("utf-8", errors="replace"), end="", flush=True)


def _unknown_layout(what: str) -> ArtifactError:
    return ArtifactError(
        f"xllamacpp {xllamacpp.__version__} has another interface of llama.h than lilliput/runtime/llama_library.py "
        f"knows: {what}; install the release that requirements.lock names"
    )
