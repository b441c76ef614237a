"""The Runtime protocol for ONNX Runtime GenAI, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

from lilliput.errors import ArtifactError
from lilliput.runtime.protocol import Ids, Receive, ScoresByPrediction

genai: Any = onnxruntime_genai  # a compiled module without types


class OnnxRuntime(ScoresByPrediction):
    """A model opened by ONNX Runtime GenAI; runs one sequence at a time and reuses the prefix shared with the last.

    Args:
        folder: `genai_config.json`, the graph, its weights and the tokenizer.
        threads: CPU threads for prompts and answers.
        context_tokens: maximum tokens of prompt and answer together.

    Raises:
        ArtifactError: the runtime cannot open the model.
    """

    name = "onnxruntime-genai"

    def __init__(self, folder: Path, threads: int, context_tokens: int) -> None:
        self._folder, self._threads = folder, threads
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        try:
            config = genai.Config(str(folder))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model = genai.Model(config)
            self._tokenizer = genai.Tokenizer(self._model)
            params = genai.GeneratorParams(self._model)
            params.set_search_options(max_length=max(context_tokens, _window(folder)), do_sample=False)
            self._generator = genai.Generator(self._model, params)
        except Exception as error:  # RuntimeError and its own classes
            raise ArtifactError(
                f"{folder}: ONNX Runtime does not open it: {_first_line(error)}; compile this candidate again"
            ) from None
        self._ids: list[int] = []

    def stats(self) -> dict[str, str]:
        """Returns engine and threads."""
        return {"engine": f"onnxruntime-genai {genai.__version__}", "threads": str(self._threads)}

    def predictions(self, ids: Ids, start: int) -> Iterator[tuple[float, int]]:
        """Yields (log-likelihood given the tokens before, likeliest token) for each token of `ids` from `start` on."""
        rows: Any = self._logits(ids, start).astype(np.float64)
        for row, token in zip(rows, ids[start:], strict=True):
            highest = row.max()
            yield float(row[token] - highest - np.log(np.exp(row - highest).sum())), int(row.argmax())

    def logits(self, prompts: Sequence[Ids], continuations: Sequence[Ids], receive: Receive) -> None:
        """Calls `receive` once for each prompt, in any order, with the logits that predict its continuation."""
        for row, (prompt, ids) in enumerate(zip(prompts, continuations, strict=True)):
            receive(row, self._logits([*prompt, *ids], len(prompt)).astype(np.float32))

    def generate(self, prompts: Sequence[Ids], max_tokens: int) -> list[str]:
        """Returns greedy answers of at most `max_tokens` tokens, without the end token."""
        return [self._text(list(self.stream(ids, max_tokens))) for ids in prompts]

    def stream(self, prompt: Ids, max_tokens: int) -> Iterator[int]:
        """Yields the greedy tokens of one answer as they are generated, including the end token."""
        self._feed(prompt)
        for _ in range(max_tokens):
            self._generator.generate_next_token()
            token = int(self._generator.get_next_tokens()[0])
            self._ids.append(token)
            yield token
            if self._generator.is_done():
                return

    def _logits(self, ids: Ids, start: int) -> np.ndarray:
        """Returns the logits that predict the tokens of `ids` from `start` on, shape (tokens, vocabulary)."""
        self._feed(ids[:start])
        logits = [self._generator.get_output("logits")[0, -1:]]
        if len(ids) > start + 1:
            self._append(ids[start:-1])
            logits.append(self._generator.get_output("logits")[0])
        return np.concatenate(logits)

    def _text(self, ids: list[int]) -> str:
        """Returns the text of an answer; removes the end token, which decoding keeps unless it is marked as special."""
        ended = ids and ids[-1] in self._tokenizer.eos_token_ids
        return str(self._tokenizer.decode(ids[:-1] if ended else ids)).strip()

    def _feed(self, ids: Ids) -> None:
        """Sets the generator's sequence to `ids`, reusing the prefix shared with its previous sequence."""
        # Not `shared_prefix_length`: its module would load transformers into the measured process.
        difference = next((place for place, (a, b) in enumerate(zip(self._ids, ids, strict=False)) if a != b), None)
        keep = min(len(self._ids), len(ids)) - 1 if difference is None else difference
        keep = max(0, min(keep, len(ids) - 1))
        self._generator.rewind_to(keep)
        self._ids = self._ids[:keep]
        self._append(ids[keep:])

    def _append(self, ids: Ids) -> None:
        try:
            self._generator.append_tokens(np.array(ids, dtype=np.int32))
        except Exception as error:
            raise ArtifactError(f"{self._folder}: ONNX Runtime: {_first_line(error)}") from None
        self._ids += ids


def _window(folder: Path) -> int:
    """Returns the tokens in the cache of layers with a window, which cannot be smaller; 0 without such layers."""
    file = folder / "genai_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"model": {"decoder": {}}}
    return int(settings["model"]["decoder"].get("sliding_window", {}).get("window_size", 0))


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
