"""A teacher's likeliest next tokens, computed once and kept: later runs with the same teacher and text need no teacher.

What is left out is one more bucket, so that a distribution over k + 1 outcomes remains. Its forward KL is at most that
over the whole vocabulary (the data processing inequality), and equal to it when k is the vocabulary.
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

from lilliput.artifacts import written_aside
from lilliput.training.answer_loss import answer_logits
from lilliput.training.checkpoint import fingerprint
from lilliput.training.examples import Batch, Example, collate
from lilliput.training.loop import IGNORED

_EXAMPLES_AT_ONCE = 32


@dataclass(frozen=True)
class StoredLogits:
    """What a teacher finds likely at each answer token of some examples.

    Attributes:
        log_probabilities: float32 (answer tokens, k + 1), of the k likeliest tokens and of all others together.
        tokens: int64 (answer tokens, k), which those are.
        rows: from and to which row an example reaches; an example is known by its token ids.
    """

    log_probabilities: torch.Tensor
    tokens: torch.Tensor
    rows: dict[tuple[int, ...], tuple[int, int]]

    def of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """`log_probabilities` and `tokens` for a batch, its answer tokens in the order of `answer_logits`."""
        pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        spans = [self.rows[tuple(ids[mask].tolist())] for ids, mask in pairs]
        rows = torch.cat([torch.arange(*span) for span in spans])
        where = batch["input_ids"].device
        return self.log_probabilities[rows].to(where), self.tokens[rows].to(where)


def stored_logits(
    cache: Path,
    teacher_sha256: str,
    open_teacher: Callable[[], torch.nn.Module],
    examples: Sequence[Example],
    pad_id: int,
    temperature: float,
    top_k: int,
) -> StoredLogits:
    """The teacher's `top_k` on `examples` at `temperature`, from `cache`, or computed and left there.

    Args:
        cache: a folder; the file in it is named by all that it follows from.
        teacher_sha256: the teacher's identity.
        open_teacher: called only if the file is not there yet.
        examples: token ids, which hold the data, the system line and the tokenizer's part.
        pad_id: fills up batches.
        temperature: divides the logits.
        top_k: at most the vocabulary.
    """
    asked = [[example.input_ids, example.labels] for example in examples]
    path = cache / f"{fingerprint(teacher_sha256, asked, temperature, top_k)}.safetensors"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # two students of one teacher, side by side: the second waits and reads
        if not path.exists():
            with written_aside(path) as partial:
                save_file(_ask(open_teacher(), examples, pad_id, temperature, top_k), partial)
    stored = load_file(path)
    lengths = (sum(label != IGNORED for label in example.labels) for example in examples)
    spans = pairwise(accumulate(lengths, initial=0))
    rows = {tuple(example.input_ids): span for example, span in zip(examples, spans, strict=True)}
    return StoredLogits(stored["log_probabilities"], stored["tokens"].long(), rows)


def buckets(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of `tokens`, and in a last column of all other tokens together.

    Args:
        logits: float32 (rows, vocabulary).
        tokens: int64 (rows, k).

    Returns:
        Float32 (rows, k + 1).
    """
    log_probabilities = log_softmax(logits, dim=-1)
    rest = log_probabilities.exp().scatter(-1, tokens, 0.0).sum(-1, keepdim=True)
    floor = torch.finfo(rest.dtype).tiny  # where nothing is left over the bucket weighs nothing, but has a logarithm
    return torch.cat([log_probabilities.gather(-1, tokens), rest.clamp_min(floor).log()], dim=-1)


@torch.no_grad()
def _ask(
    teacher: torch.nn.Module, examples: Sequence[Example], pad_id: int, temperature: float, top_k: int
) -> dict[str, torch.Tensor]:
    found, chosen = [], []
    where = next(teacher.parameters()).device
    for start in tqdm(range(0, len(examples), _EXAMPLES_AT_ONCE), desc="teacher", unit="batch"):
        batch = collate(examples[start : start + _EXAMPLES_AT_ONCE], pad_id)
        logits = answer_logits(teacher, {name: tensor.to(where) for name, tensor in batch.items()})[0] / temperature
        tokens = logits.topk(min(top_k, logits.shape[-1])).indices
        found.append(buckets(logits, tokens).cpu())
        chosen.append(tokens.int().cpu())
    return {"log_probabilities": torch.cat(found), "tokens": torch.cat(chosen)}
