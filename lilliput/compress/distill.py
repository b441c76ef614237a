"""Knowledge distillation on logits (Hinton et al., arXiv 1503.02531), by a divergence of choice.

Forward KL makes the student cover all that the teacher finds likely, reverse KL makes it keep to what the teacher finds
likeliest (Gu et al., MiniLLM, arXiv 2306.08543); Jensen–Shannon stands between them and is bounded (Agarwal et al.,
GKD, arXiv 2306.13649).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

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
    """The loss w · T² · D(teacher, student) + (1 − w) · cross-entropy over answer tokens, in nats.

    T² keeps the size of the gradient independent of the temperature (Hinton et al., section 2).
    """

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits, targets = answer_logits(model, batch)
        with torch.no_grad():
            teacher_logits, _ = answer_logits(teacher, batch)
        soft = divergence(teacher_logits / config.temperature, logits / config.temperature, config.divergence)
        hard = cross_entropy(logits, targets)
        return config.kl_weight * config.temperature**2 * soft + (1.0 - config.kl_weight) * hard

    return loss


def divergence(
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    kind: Literal["forward_kl", "reverse_kl", "jensen_shannon"],
) -> torch.Tensor:
    """The mean divergence over tokens of the student's distribution from the teacher's, a scalar in nats.

    With p the teacher's and q the student's: forward KL(p ‖ q), reverse KL(q ‖ p), or Jensen–Shannon
    ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q), at most ln 2.

    Args:
        teacher_logits: float tensor (tokens, vocabulary).
        student_logits: likewise.
        kind: which.
    """
    p, q = log_softmax(teacher_logits, dim=-1), log_softmax(student_logits, dim=-1)
    if kind == "forward_kl":
        return _kl(p, q)
    if kind == "reverse_kl":
        return _kl(q, p)
    middle = torch.logaddexp(p, q) - math.log(2.0)
    return 0.5 * (_kl(p, middle) + _kl(q, middle))


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of log-probabilities."""
    return kl_div(q, p, log_target=True, reduction="batchmean")
