"""Gradient descent on questions and their answers, shared by LoRA and distillation; the loop is transformers' own.

It runs on accelerate, in one process or in several (`accelerate launch`): data parallel, or sharded by FSDP 2, as its
environment says. A batch is shared out among the processes, so that what is learnt does not depend on their number but
for rounding. Every process has the trained weights afterwards.
"""

from __future__ import annotations

import copy
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from lilliput.artifacts import remove, writing
from lilliput.config import TrainingConfig
from lilliput.data.lazy import pick
from lilliput.data.questions import Question
from lilliput.errors import StrategyError
from lilliput.models import device, sharded
from lilliput.statistics.perplexity import IGNORED
from lilliput.training.answer_loss import causal_lm
from lilliput.training.checkpoint import (
    last_checkpoint,
    load_checkpoint_weights,
    load_optimizer,
    load_random,
    load_weights,
    save_state,
    save_weights,
)
from lilliput.training.examples import Batch, Example, collate

Loss = Callable[[torch.nn.Module, Batch], torch.Tensor]
History = dict[str, list[tuple[int, float]]]


class _WithLoss(torch.nn.Module):
    """A model whose forward is its loss: what is shared out among processes counts gradients by calls of `forward`."""

    def __init__(self, model: torch.nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.config = model.config
        self._no_split_modules = getattr(causal_lm(model), "_no_split_modules", None)  # what FSDP shards by

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.loss(self.model, batch)


class _AnswerTrainer(Trainer):
    """transformers' Trainer with our loss, our validation and checkpoints that are not pickled."""

    model: Any
    bfloat16: bool

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the answer tokens of a whole step, of which `inputs` may be a part.

        With gradient accumulation the Trainer adds the parts up, and says how many tokens there are in all. Processes
        take the mean of their gradients where the sum is wanted, hence their number.
        """
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = model(**inputs)
        if num_items_in_batch is None:
            return loss
        return loss * (_answer_tokens(inputs) / num_items_in_batch) * processes()

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """The mean loss over all answer tokens that were set aside, in nats; draws no random numbers."""
        self.model.eval()
        examples, size = self.eval_dataset.examples, self.args.per_device_train_batch_size  # pyright: ignore
        batches = (self.data_collator(examples[start : start + size]) for start in range(0, len(examples), size))
        total, tokens = 0.0, 0
        for batch in map(self._prepare_inputs, batches):
            count = int(_answer_tokens(batch))
            total, tokens = total + count * self.model(**batch).item(), tokens + count
        metrics = {"eval_loss": total / tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.control.should_training_stop or not self.state.is_world_process_zero:
            return  # after a stop the result comes next, and a training that has stopped must not go on
        folder = Path(str(self.args.output_dir))
        earlier = list(folder.glob("checkpoint-*"))
        with writing(folder / f"checkpoint-{self.state.global_step}") as target:
            save_state(self.model.model, self.optimizer, self.lr_scheduler, target)
            self.state.save_to_json(str(target / TRAINER_STATE_NAME))
        for old in earlier:
            remove(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_checkpoint_weights(self.model.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint:
            load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint:
            load_random(Path(checkpoint))


class _KeepBest(TrainerCallback):
    """Keeps the weights of the best validation, and stops after `patience` without a better one.

    It reads the log, so that a resumed training needs no memory of its own. transformers' EarlyStoppingCallback would,
    and leaves keeping to pickled checkpoints.
    """

    def __init__(self, path: Path, patience: int) -> None:
        self.path, self.patience = path, patience

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each validation, which is the log's last entry."""
        losses = [value for _, value in _curve(state, "eval_loss")]
        since_best = len(losses) - 1 - losses.index(min(losses))
        if since_best == 0:
            save_weights(kwargs["model"].model, self.path)
        control.should_training_stop |= since_best >= self.patience


def set_aside(questions: Sequence[Question], config: TrainingConfig) -> tuple[Sequence[Question], Sequence[Question]]:
    """Questions to train on and to validate on; all questions of a group are on one side.

    Raises:
        StrategyError: there are too few groups for both sides.
    """
    if not config.validation_share:
        return questions, []
    groups = sorted({question.group for question in questions})
    drawn = {*random.Random(f"{config.seed}/validation").sample(groups, round(config.validation_share * len(groups)))}
    if not 0 < len(drawn) < len(groups):
        raise StrategyError(
            f"validation_share: {config.validation_share} of {len(groups)} training groups leaves nothing to validate "
            "or to train on; give more groups or another share (0 for no validation)"
        )
    validated = [place for place, question in enumerate(questions) if question.group in drawn]
    learnt = sorted({*range(len(questions))} - {*validated})
    return pick(questions, learnt), pick(questions, validated)


def computes_in_bfloat16(config: TrainingConfig) -> bool:
    """Whether `config.precision` means bfloat16 on this machine; `auto` goes by the hardware, never by the clock.

    Two timings of the same work may come out either way, and the same inputs would then give other bytes.
    """
    if config.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bfloat16"


def train(
    model: torch.nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    config: TrainingConfig,
    loss: Loss,
    validation: Sequence[Example] = (),
    checkpoints: Path | None = None,
) -> History:
    """Trains `model` in place for `config.steps` steps, or until validation no longer improves.

    Args:
        model: in training mode, what is to be trained marked by `requires_grad`.
        examples: to train on.
        pad_id: fills up batches.
        config: schedule and seed.
        loss: of a batch, a mean over its answer tokens; in evaluation mode it must draw no random numbers.
        validation: examples by which to stop, and to choose the weights that are kept.
        checkpoints: a folder that outlives a kill, for this training alone; what is found there is continued from, and
            the result is the same. The caller removes it when the result is safe.

    Returns:
        The curves `loss` and, with validation, `validation_loss`: (step, nats).

    Raises:
        StrategyError: the loss is NaN or infinite.
        StrategyError: the processes cannot share the batches, or FSDP is asked for what it cannot do here.
    """
    _require_shareable(config)
    learner = copy.deepcopy(model) if sharded() else model  # sharding changes a model's parameters for good
    with _folder(checkpoints) as folder:
        best = folder / f"best-{os.environ.get('RANK', '0')}.safetensors"  # each process its own: they are the same
        trainer = _AnswerTrainer(
            model=_WithLoss(learner, loss),
            args=_arguments(folder, config, validate=bool(validation)),
            train_dataset=_Examples(examples),
            eval_dataset=_Examples(validation) if validation else None,
            data_collator=lambda rows: collate(rows, pad_id),
            callbacks=[_KeepBest(best, config.patience)] if validation else [],
        )
        trainer.bfloat16 = computes_in_bfloat16(config)
        last = last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        if validation:
            load_weights(model, best)
    if sharded():
        _gather(learner, model)
    curve = _curve(trainer.state, "loss")
    if not all(math.isfinite(value) for _, value in curve):
        raise StrategyError("the training diverged: its loss is NaN or infinite; lower learning_rate")
    return {"loss": curve} | ({"validation_loss": _curve(trainer.state, "eval_loss")} if validation else {})


def processes() -> int:
    """How many processes train together; 1 unless accelerate started this one beside others."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device() -> torch.device:
    """Where this process computes; a model that FSDP is to share out is opened elsewhere."""
    return cast("torch.device", PartialState().device) if processes() > 1 else device()


@contextmanager
def main_process_first() -> Iterator[None]:
    """The main process is through the block before others enter it, and find there what it left on the disk."""
    if processes() == 1:
        yield
        return
    with PartialState().main_process_first():
        yield


def _require_shareable(config: TrainingConfig) -> None:
    if config.batch_size % processes():
        raise StrategyError(
            f"batch_size: {config.batch_size} examples cannot be shared out evenly among {processes()} processes; "
            "change one of them"
        )
    if sharded() and config.validation_share:
        raise StrategyError("validation_share: weights sharded by FSDP are not kept by validation; set it to 0")


@torch.no_grad()
def _gather(learner: torch.nn.Module, model: torch.nn.Module) -> None:
    """Gives `model` the trained weights of `learner`, which the processes hold in parts; all processes call this."""
    whole = dict(model.named_parameters())
    for name, part in learner.named_parameters():
        if part.requires_grad:
            whole[name].copy_(cast("Any", part).full_tensor())


def outcome(history: History, config: TrainingConfig) -> dict[str, Any]:
    """What a manifest tells of a training: precision, last loss and, with validation, the step that was kept."""
    facts: dict[str, Any] = {
        "precision": "bfloat16" if computes_in_bfloat16(config) else "float32",
        "final_loss": history["loss"][-1][1],
    }
    if processes() > 1:  # sums over shared batches are rounded otherwise, so bytes differ from those of one process
        facts["processes"] = processes()
    if "validation_loss" in history:
        facts["best_step"], facts["validation_loss"] = min(history["validation_loss"], key=lambda point: point[1])
    return facts


@contextmanager
def _folder(checkpoints: Path | None) -> Iterator[Path]:
    if checkpoints:
        checkpoints.mkdir(parents=True, exist_ok=True)
        yield checkpoints
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


def _arguments(folder: Path, config: TrainingConfig, validate: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
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
        eval_strategy="steps" if validate else "no",
        eval_steps=config.evaluate_every,
        save_strategy="steps" if config.checkpoint_every and not sharded() else "no",
        save_steps=config.checkpoint_every or 1,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        accelerator_config={"split_batches": True},  # `batch_size` is that of all processes together
    )


def _answer_tokens(batch: Batch) -> torch.Tensor:
    return (batch["labels"][:, 1:] != IGNORED).sum()


def _curve(state: TrainerState, name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in state.log_history if name in row]


class _Examples(Dataset):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]
