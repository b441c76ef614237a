"""Gradient descent on questions and their answers, shared by LoRA and distillation; the loop is transformers' own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from lilliput.config import TrainingConfig
from lilliput.data.chat import encode_answer, encode_prompt
from lilliput.data.questions import ABSTENTION, Question
from lilliput.models import vocabulary_logits

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and answer; `labels` equals `input_ids` on the answer and IGNORED before it."""

    input_ids: list[int]
    labels: list[int]


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, questions: Sequence[Question]
) -> list[Example]:
    """Each question with its answer (an abstention where there is none) under the chat template."""
    examples = []
    for question in questions:
        prompt = encode_prompt(tokenizer, system_prompt, question.question)
        answer = encode_answer(tokenizer, question.answer or ABSTENTION)
        examples.append(Example(prompt + answer, [IGNORED] * len(prompt) + answer))
    return examples


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors `input_ids`, `attention_mask`, `labels`, each int64 of shape (batch, longest)."""
    longest = max(len(example.input_ids) for example in examples)

    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    return {
        "input_ids": pad([example.input_ids for example in examples], pad_id),
        "attention_mask": pad([[1] * len(example.input_ids) for example in examples], 0),
        "labels": pad([example.labels for example in examples], IGNORED),
    }


def answer_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits where the next token belongs to an answer, and that token.

    What all rows begin with (system line, chat template) is run once and its keys and values are repeated for the rows,
    which gradients flow through: with short questions that is most of the tokens. The vocabulary projection, a fifth of
    a small model's work, is run on answer positions alone. Neither changes the result but for rounding.

    Args:
        model: a causal LM, possibly wrapped by peft.
        batch: as `collate` gives it.

    Returns:
        Logits (answer tokens, vocabulary) and targets (answer tokens,).
    """
    causal_lm: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    ids, targets = batch["input_ids"], batch["labels"][:, 1:]
    wanted = targets != IGNORED
    shared = _shared_beginning(ids, wanted)
    cache = DynamicCache(config=causal_lm.config)
    if shared:
        causal_lm.model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(ids))
    hidden = causal_lm.model(
        input_ids=ids[:, shared:],
        attention_mask=batch["attention_mask"],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return vocabulary_logits(causal_lm, hidden[:, :-1][wanted[:, shared:]]), targets[wanted]


def _shared_beginning(ids: torch.Tensor, wanted: torch.Tensor) -> int:
    """How many tokens all rows begin with, short of the first from which an answer is predicted."""
    same = (ids == ids[0]).all(dim=0).long().cumprod(0).sum()
    first = wanted.any(dim=0).long().argmax()
    return int(torch.minimum(same, first)) if len(ids) > 1 else 0


def label_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy over the answer tokens alone, a scalar in nats."""
    logits, targets = answer_logits(model, batch)
    return cross_entropy(logits, targets)


Loss = Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]


class _AnswerTrainer(Trainer):
    """transformers' Trainer with our loss: its documented place for one is this method."""

    loss: Loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the answer tokens of a whole step, of which `inputs` may be a part.

        With gradient accumulation the Trainer adds the parts up, and says how many tokens there are in all.
        """
        loss = self.loss(model, inputs)
        if num_items_in_batch is None:
            return loss
        return loss * ((inputs["labels"][:, 1:] != IGNORED).sum() / num_items_in_batch)


def train(
    model: torch.nn.Module, examples: Sequence[Example], pad_id: int, config: TrainingConfig, loss: Loss
) -> list[tuple[int, float]]:
    """Trains `model` in place for `config.steps` steps; the loss of each step as (step, nats).

    Raises:
        FloatingPointError: the loss is no longer a number.
    """
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _AnswerTrainer(
            model=model,
            args=_arguments(scratch, config),
            train_dataset=_Examples(examples),
            data_collator=lambda rows: collate(rows, pad_id),
        )
        trainer.loss = loss
        trainer.train()
    curve = [(int(row["step"]), float(row["loss"])) for row in trainer.state.log_history if "loss" in row]
    if any(value != value for _, value in curve):
        raise FloatingPointError("the training loss is no longer a number; lower learning_rate")
    return curve


def _arguments(scratch: str, config: TrainingConfig) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup_share * config.steps),
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


class _Examples(Dataset):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]
