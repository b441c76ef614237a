"""A cache of a teacher's likeliest next tokens: later runs with the same teacher and text do not open the teacher.

All other tokens form one more bucket, so the result is a distribution over k + 1 outcomes. Its forward KL is at most
the KL over the whole vocabulary (data processing inequality), and equal to it if k is the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax
from tqdm import tqdm

from lilliput.artifacts import writing_file
from lilliput.statistics.perplexity import IGNORED
from lilliput.training.answer_loss import answer_logits
from lilliput.training.checkpoint import fingerprint
from lilliput.training.examples import Batch, Example, collate

_EXAMPLES_AT_ONCE = 32


@dataclass(frozen=True)
class StoredLogits:
    """A teacher's likeliest tokens at each answer token of some examples.

    Attributes:
        log_probabilities: float32 (answer tokens, k + 1), of the k likeliest tokens and of all others together.
        tokens: int64 (answer tokens, k), the likeliest tokens.
        rows: first and last row (exclusive) of each example, by the example's token ids.
    """

    log_probabilities: torch.Tensor
    tokens: torch.Tensor
    rows: dict[tuple[int, ...], tuple[int, int]]

    def of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `log_probabilities` and `tokens` of the batch's answer tokens, in the order of `answer_logits`."""
        pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        spans = [self.rows[tuple(ids[mask].tolist())] for ids, mask in pairs]
        rows = torch.cat([torch.arange(*span) for span in spans])
        device = batch["input_ids"].device
        return self.log_probabilities[rows].to(device), self.tokens[rows].to(device)


def stored_logits(
    cache: Path,
    teacher_sha256: str,
    open_teacher: Callable[[], torch.nn.Module],
    examples: Sequence[Example],
    pad_id: int,
    temperature: float,
    top_k: int,
) -> StoredLogits:
    """Returns the teacher's `top_k` on `examples` at `temperature` from `cache`, after computing them if needed.

    Args:
        cache: a folder; the file name is a fingerprint of all inputs.
        teacher_sha256: the teacher's identity.
        open_teacher: called only if the file does not exist.
        examples: token ids; they depend on the data, the system prompt and the tokenizer.
        pad_id: pads batches.
        temperature: divides the logits.
        top_k: at most the vocabulary.
    """
    rows_of_ids = [[example.input_ids, example.labels] for example in examples]
    path = cache / f"{fingerprint(teacher_sha256, rows_of_ids, temperature, top_k)}.safetensors"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # of two parallel runs with one teacher, the second waits and reads
        if not path.exists():
            with writing_file(path) as partial:
                save_file(_teacher_logits(open_teacher(), examples, pad_id, temperature, top_k), partial)
    stored = load_file(path)
    lengths = (sum(label != IGNORED for label in example.labels) for example in examples)
    spans = pairwise(accumulate(lengths, initial=0))
    rows = {tuple(example.input_ids): span for example, span in zip(examples, spans, strict=True)}
    return StoredLogits(stored["log_probabilities"], stored["tokens"].long(), rows)


def buckets(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns log-probabilities of `tokens`, and in the last column of all other tokens together.

    Args:
        logits: float32 (rows, vocabulary).
        tokens: int64 (rows, k).

    Returns:
        Float32 (rows, k + 1).
    """
    log_probabilities = log_softmax(logits, dim=-1)
    rest = log_probabilities.exp().scatter(-1, tokens, 0.0).sum(-1, keepdim=True)
    floor = torch.finfo(rest.dtype).tiny  # keeps the logarithm of an empty bucket finite
    return torch.cat([log_probabilities.gather(-1, tokens), rest.clamp_min(floor).log()], dim=-1)


@torch.no_grad()
def _teacher_logits(
    teacher: torch.nn.Module, examples: Sequence[Example], pad_id: int, temperature: float, top_k: int
) -> dict[str, torch.Tensor]:
    log_probabilities, top_tokens = [], []
    device = next(teacher.parameters()).device
    for start in tqdm(range(0, len(examples), _EXAMPLES_AT_ONCE), desc="teacher", unit="batch"):
        batch = collate(examples[start : start + _EXAMPLES_AT_ONCE], pad_id)
        logits = answer_logits(teacher, {name: tensor.to(device) for name, tensor in batch.items()})[0] / temperature
        tokens = logits.topk(min(top_k, logits.shape[-1])).indices
        log_probabilities.append(buckets(logits, tokens).cpu())
        top_tokens.append(tokens.int().cpu())
    return {"log_probabilities": torch.cat(log_probabilities), "tokens": torch.cat(top_tokens)}
