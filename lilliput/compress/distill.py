"""Knowledge distillation on logits (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lilliput.compress.result import Result
from lilliput.compress.training import Loss, answer_logits, encode_examples, train
from lilliput.config import DistillConfig
from lilliput.data.chat import pad_id
from lilliput.data.questions import Question
from lilliput.errors import StrategyError
from lilliput.models import Opened


def distill(
    student: Opened, teacher: Opened, questions: Sequence[Question], system_prompt: str, config: DistillConfig
) -> Result:
    """`student` trained to give the teacher's next-token distribution on the answers.

    Args:
        student: float model and tokenizer; the model is changed in place, all its weights.
        teacher: float model with the same vocabulary; not changed.
        questions: training questions with their answers.
        system_prompt: the system line before each question.
        config: temperature, the share of the KL term, schedule and seed.

    Raises:
        StrategyError: teacher and student do not share a tokenizer.
    """
    model, tokenizer = student
    if tokenizer.get_vocab() != teacher[1].get_vocab():
        raise StrategyError(
            "distill: teacher and student have different tokenizers, so their logits do not speak of the same tokens; "
            "choose a teacher of the same family"
        )
    torch.manual_seed(config.seed)
    examples = encode_examples(tokenizer, system_prompt, questions)
    loss = distillation_loss(teacher[0].eval(), config)
    curve = train(model.train(), examples, pad_id(tokenizer), config, loss)
    return Result(model.eval(), tokenizer, {"final_loss": curve[-1][1]}, {"loss": curve})


def distillation_loss(teacher: torch.nn.Module, config: DistillConfig) -> Loss:
    """The loss w · T² · KL(teacher ‖ student) + (1 − w) · cross-entropy over answer tokens, in nats.

    T² keeps the size of the gradient independent of the temperature (Hinton et al., section 2).
    """

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits, targets = answer_logits(model, batch)
        with torch.no_grad():
            teacher_logits, _ = answer_logits(teacher, batch)
        soft = kl_div(
            log_softmax(logits / config.temperature, dim=-1),
            log_softmax(teacher_logits / config.temperature, dim=-1),
            log_target=True,
            reduction="batchmean",
        )
        hard = cross_entropy(logits, targets)
        return config.kl_weight * config.temperature**2 * soft + (1.0 - config.kl_weight) * hard

    return loss
