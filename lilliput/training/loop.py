"""Gradient descent on questions and their answers, with transformers' Trainer.

It runs on accelerate, in one process or in several (`accelerate launch`): data parallel or sharded by FSDP 2, depending
on the environment. The processes share each batch, so the result depends on their number only through rounding.
Afterwards every process has the trained weights.
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
    PreTrainedTokenizerBase,
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
from lilliput.data.rows import Row
from lilliput.errors import StrategyError
from lilliput.hardware import gpu_multiplies_bfloat16
from lilliput.models import device, sharded
from lilliput.resident import release_memory
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
from lilliput.training.examples import ALL_TURNS, Batch, Example, Examples, TurnRules, collate
from lilliput.training.history import Curve, History

Loss = Callable[[torch.nn.Module, Batch], torch.Tensor]


class _WithLoss(torch.nn.Module):
    """A model whose forward is the loss: distributed wrappers synchronise gradients by calls of `forward`."""

    def __init__(self, model: torch.nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.config = model.config
        self._no_split_modules = getattr(causal_lm(model), "_no_split_modules", None)  # FSDP's units

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.loss(self.model, batch)


class _AnswerTrainer(Trainer):
    """transformers' Trainer with our loss, our validation and checkpoints without pickle."""

    model: Any
    bfloat16: bool

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the share of `inputs` in the mean loss over all answer tokens of a step.

        With gradient accumulation the Trainer sums the parts of a step and passes their number of tokens. The processes
        average their gradients where a sum is needed, hence the factor.
        """
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = model(**inputs)
        if num_items_in_batch is None:
            return loss
        return loss * (_answer_tokens(inputs) / num_items_in_batch) * process_count()

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Returns the mean loss over all answer tokens of the validation set, in nats; draws no random numbers."""
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
            return  # a stopped training must not be resumed
        folder = Path(str(self.args.output_dir))
        old_checkpoints = list(folder.glob("checkpoint-*"))
        with writing(folder / f"checkpoint-{self.state.global_step}") as target:
            save_state(self.model.model, self.optimizer, self.lr_scheduler, target)
            self.state.save_to_json(str(target / TRAINER_STATE_NAME))
        for old in old_checkpoints:
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
    """Saves the weights of the best validation, and stops after `patience` validations without a better one.

    It reads the log, so a resumed training needs no further state. transformers' EarlyStoppingCallback needs it, and
    relies on pickled checkpoints to keep the best weights.
    """

    def __init__(self, path: Path, patience: int) -> None:
        self.path, self.patience = path, patience

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after each validation, which is the last entry of the log."""
        losses = [value for _, value in _curve(state, "eval_loss")]
        since_best = len(losses) - 1 - losses.index(min(losses))
        if since_best == 0:
            save_weights(kwargs["model"].model, self.path)
        control.should_training_stop |= since_best >= self.patience


def split_validation(questions: Sequence[Row], config: TrainingConfig) -> tuple[Sequence[Row], Sequence[Row]]:
    """Splits `questions` into rows for training and for validation; all rows of a group are on one side.

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
            "or to train on; add groups or choose another share (0 for no validation)"
        )
    validation = [index for index, question in enumerate(questions) if question.group in drawn]
    training = sorted({*range(len(questions))} - {*validation})
    return pick(questions, training), pick(questions, validation)


def training_examples(
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    rows: Sequence[Row],
    config: TrainingConfig,
    rules: TurnRules = ALL_TURNS,
) -> tuple[Examples, Examples]:
    """Returns the examples to train on and to validate on; they are encoded on access."""
    training, validation = split_validation(rows, config)
    return Examples(tokenizer, system_prompt, training, rules), Examples(tokenizer, system_prompt, validation, rules)


def computes_in_bfloat16(config: TrainingConfig) -> bool:
    """Returns whether `config.precision` means bfloat16 on this machine.

    `auto` depends on the hardware, never on a timing: timings vary, and the same inputs would give other bytes. It
    keeps float32 on every processor, so that results of several processors can be compared.
    """
    if config.precision == "auto":
        return gpu_multiplies_bfloat16()
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
        model: in training mode; `requires_grad` marks the trainable weights.
        examples: to train on.
        pad_id: pads batches.
        config: schedule and seed.
        loss: mean over the answer tokens of a batch; in evaluation mode it must draw no random numbers.
        validation: examples that decide when to stop and which weights to keep.
        checkpoints: a persistent folder for this training only. A killed training resumes from it with the same
            result. The caller removes it after storing the result.

    Returns:
        The curves `loss` and, with validation, `validation_loss`: (step, nats).

    Raises:
        StrategyError: the loss is NaN or infinite, the processes cannot share the batches evenly, or FSDP does not
            support the settings.
    """
    _require_shareable(config)
    learner = copy.deepcopy(model) if sharded() else model  # sharding replaces a model's parameters permanently
    with _folder(checkpoints) as folder:
        best = folder / f"best-{os.environ.get('RANK', '0')}.safetensors"  # one per process, with equal content
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
    curve, validation_curve = _curve(trainer.state, "loss"), _curve(trainer.state, "eval_loss")
    del trainer
    release_memory()  # the moments, and activations that glibc would keep
    if not all(math.isfinite(value) for _, value in curve):
        raise StrategyError("the training diverged: its loss is NaN or infinite; lower learning_rate")
    return {"loss": curve} | ({"validation_loss": validation_curve} if validation else {})


def process_count() -> int:
    """Returns the number of processes that train together; more than 1 only under accelerate."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def training_device() -> torch.device:
    """Returns the device of this process; a model to be sharded by FSDP is opened elsewhere."""
    return cast("torch.device", PartialState().device) if process_count() > 1 else device()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Lets the main process run the block before the others, which then find its files."""
    if process_count() == 1:
        yield
        return
    with PartialState().main_process_first():
        yield


def _require_shareable(config: TrainingConfig) -> None:
    if config.batch_size % process_count():
        raise StrategyError(
            f"batch_size: {config.batch_size} examples cannot be divided evenly among {process_count()} processes; "
            "change one of the two"
        )
    if sharded() and config.validation_share:
        raise StrategyError("validation_share: validation cannot keep weights that FSDP has sharded; set it to 0")


@torch.no_grad()
def _gather(learner: torch.nn.Module, model: torch.nn.Module) -> None:
    """Copies the trained weights of `learner`, sharded over the processes, to `model`; all processes must call this."""
    weights = dict(model.named_parameters())
    for name, shard in learner.named_parameters():
        if shard.requires_grad:
            weights[name].copy_(cast("Any", shard).full_tensor())


def training_facts(history: History, config: TrainingConfig, examples: Examples | None = None) -> dict[str, Any]:
    """Returns facts for the manifest: precision, last loss and, with validation, the step with the best weights.

    If some of `examples` were too long, the facts also have the numbers of shortened and skipped rows.
    """
    facts: dict[str, Any] = {
        "precision": "bfloat16" if computes_in_bfloat16(config) else "float32",
        "final_loss": history["loss"][-1][1],
    }
    if process_count() > 1:  # sums are rounded differently, so the bytes differ from a training in one process
        facts["processes"] = process_count()
    if examples is not None:
        counts = {"shortened_rows": len(examples.shortened), "skipped_rows": len(examples.skipped)}
        facts |= {name: count for name, count in counts.items() if count}
    if "validation_loss" in history:
        facts["best_step"], facts["validation_loss"] = min(history["validation_loss"], key=lambda point: point[1])
    return facts


@contextmanager
def _folder(checkpoints: Path | None) -> Iterator[Path]:
    """Yields the folder `checkpoints`, or a temporary one."""
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
        accelerator_config={"split_batches": True},  # `batch_size` is the sum over all processes
    )


def _answer_tokens(batch: Batch) -> torch.Tensor:
    return (batch["labels"][:, 1:] != IGNORED).sum()


def _curve(state: TrainerState, name: str) -> Curve:
    return [(int(row["step"]), float(row[name])) for row in state.log_history if name in row]


class _Examples(Dataset):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]
