"""Compares a model opened from a GGUF file with llama.cpp running the same file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.devices.runs import DeviceJob, DeviceOutcome, run_on_device
from lilliput.errors import ArtifactError, SourceError
from lilliput.gguf_source.header import USE_SAFETENSORS, Header
from lilliput.records import Agreement
from lilliput.statistics.agreement import agreement

_PASSAGE = """The river rises in the northern hills, crosses three provinces and reaches the sea after 840 kilometres.
Its water drives eleven mills and two power stations; the older one was built in 1912 and still runs every winter.
Farmers along the lower valley grow rice, beans and a red onion that is sold as far away as Lisbon and Cairo.
In dry years the council closes the upper gates from June to September, and each village receives water one day a week.
A lighthouse keeper writes down the weather four times a day: wind, pressure, temperature and the height of the waves.
On the first of March the pressure fell from 1013 to 987 in nine hours, and by midnight the boats were in the harbour.
Two of them had lost their nets; the third brought home forty crates of herring, which were sold before breakfast.
The storm ended on Thursday, and the school, the bakery and the post office opened again at eight in the morning.

"""
_TOKENS = 320
# The last tokens are predicted, in the second copy of the passage. A model copies them from a long distance, so near
# ties are few, and wrong positions show up as errors.
_PREDICTED = 64
_CLEAR_NATS = 0.5
# llama.cpp rounds activations to 8 bits beside quantised weights. SmolLM2-135M in Q4_1: 1.0, 1.0 and 0.006 nats. At 160
# positions, with ten times its rope_theta 0.96, 0.99 and 0.22 nats; with its positions halved 0.47, 0.57 and 2.4 nats.
_MIN_SAME, _MIN_SAME_CLEAR, _MAX_NATS = 0.9, 0.98, 0.1
_DEADLINE_S = 1800.0


def probe_ids(tokenizer: PreTrainedTokenizerBase, context_tokens: int) -> list[int]:
    """Returns the token ids of the probe text, as many as `context_tokens` allows."""
    ids = list(tokenizer(2 * _PASSAGE)["input_ids"])  # pyright: ignore[reportArgumentType]
    while len(ids) < _TOKENS:
        ids += ids
    return ids[: min(_TOKENS, context_tokens - 8)]


def llama_cpp_outcome(file: Path, ids: Sequence[int], texts: Sequence[str] = ()) -> DeviceOutcome:
    """Returns llama.cpp's predictions of the last tokens of `ids`, and its ids of `texts`; runs a new process.

    Raises:
        SourceError: llama.cpp does not open or run the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(file.absolute())
        job = DeviceJob(
            "gguf",
            folder,
            threads=torch.get_num_threads(),
            context_tokens=len(ids) + 8,
            predict=list(ids),
            predict_from=_first_predicted(ids),
            texts=list(texts),
        )
        try:
            return run_on_device(job, memory_bytes=None, deadline_s=_DEADLINE_S)
        except ArtifactError as error:
            raise SourceError(
                f"{file}: llama.cpp does not run this file, so the model opened from it cannot be checked; download it "
                f"again, or {USE_SAFETENSORS}. llama.cpp: {error}"
            ) from None


def require_same_model(
    header: Header, model: PreTrainedModel, ids: Sequence[int], predictions: Sequence[tuple[float, int]]
) -> Agreement:
    """Compares `model` with llama.cpp's `predictions` for the last tokens of `ids`, and returns the agreement.

    Raises:
        SourceError: they differ by more than rounding explains.
    """
    with torch.inference_mode():
        logits = model(torch.tensor([list(ids)])).logits[0]
    start = _first_predicted(ids)
    expected = logits[start - 1 :].float().log_softmax(-1)
    record = agreement(ids[start - 1 :], expected, predictions, _CLEAR_NATS)
    same, clear, nats = record.same_argmax, record.same_argmax_clear, record.mean_absolute_difference_nats
    agrees = nats <= _MAX_NATS and (clear.value is None or clear.value >= _MIN_SAME_CLEAR)
    if not agrees or (clear.n and (same.value or 0.0) < _MIN_SAME):
        raise SourceError(
            f"{header.file}: {type(model).__name__} in transformers differs from the model that llama.cpp runs: "
            f"same next token at {same.value:.2f} of {same.n} positions (at least {_MIN_SAME} required), at "
            f"{clear.value or 0:.2f} of {clear.n} without a near tie (at least {_MIN_SAME_CLEAR}); mean "
            f"difference of log-likelihoods {nats:.2g} nats (at most {_MAX_NATS}). Every hyperparameter of the file "
            f"was copied, so transformers computes this architecture differently; {USE_SAFETENSORS}"
        )
    return record


def _first_predicted(ids: Sequence[int]) -> int:
    return max(1, len(ids) - _PREDICTED)
