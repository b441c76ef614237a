"""Knowledge distillation on logits (Hinton et al., arXiv 1503.02531), by a divergence of choice.

Forward KL makes the student cover all that the teacher finds likely, reverse KL makes it keep to what the teacher finds
likeliest (Gu et al., MiniLLM, arXiv 2306.08543); Jensen–Shannon stands between them and is bounded. On-policy batches
hold the student's own answers, so that it learns from the mistakes it makes (Agarwal et al., GKD, arXiv 2306.13649).
Hidden states may be drawn to the teacher's besides (Jiao et al., TinyBERT, arXiv 1909.10351, eq. 8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lilliput.artifacts import read_manifest
from lilliput.chat.template import end_ids, pad_id
from lilliput.compress.result import Result
from lilliput.config import DistillConfig
from lilliput.data.questions import Question
from lilliput.errors import StrategyError
from lilliput.models import open_model, read_config, sharded
from lilliput.training.answer_loss import answer_logits, answer_states, answer_vocabulary
from lilliput.training.examples import Batch, Example, collate, encode_examples, lazy_examples
from lilliput.training.loop import IGNORED, Loss, main_process_first, outcome, own_device, set_aside, train
from lilliput.training.stored_logits import StoredLogits, buckets, stored_logits


def distill(
    student: Path,
    teacher: Path,
    questions: Sequence[Question],
    system_prompt: str,
    config: DistillConfig,
    cache: Path,
    checkpoints: Path | None = None,
) -> Result:
    """The model in `student`, all its weights trained to give the teacher's next-token distribution on the answers.

    Args:
        student: folder of a float checkpoint.
        teacher: folder of an artefact with the same tokenizer.
        questions: training questions with their answers.
        system_prompt: the system line before each question.
        config: divergence, temperature, the shares of the terms, schedule and seed.
        cache: where stored logits of teachers are kept.
        checkpoints: where a killed training goes on from (see `train`).

    Raises:
        StrategyError: teacher and student do not share a tokenizer, or have hidden states of different sizes to match.
    """
    _require_kinship(student, teacher, config)
    model, tokenizer = open_model(student)
    torch.manual_seed(config.seed)
    learnt, validated = (lazy_examples(tokenizer, system_prompt, part) for part in set_aside(questions, config))
    facts = {}
    if config.on_policy_share and sharded():
        raise StrategyError("on_policy_share: a student sharded by FSDP cannot answer by itself; set it to 0")
    if config.teacher_logits == "stored":
        sha256, examples = read_manifest(teacher).artifact_sha256, encode_examples(tokenizer, system_prompt, questions)
        with main_process_first():
            stored = stored_logits(
                cache,
                sha256,
                lambda: open_model(teacher)[0],
                examples,
                pad_id(tokenizer),
                config.temperature,
                config.top_k,
            )
        loss = stored_distillation_loss(stored, config)
    else:
        origins = layer_origins(student, teacher) if config.hidden_weight else []
        facts = {"matched_teacher_layers": origins} if origins else {}
        taught = cast(PreTrainedModel, cast(torch.nn.Module, open_model(teacher)[0]).to(own_device()))
        loss = distillation_loss(taught, tokenizer, config, origins)
    history = train(model.train(), learnt, pad_id(tokenizer), config, loss, validated, checkpoints)
    return Result(model.eval(), tokenizer, outcome(history, config) | facts, dict(history))


def _require_kinship(student: Path, teacher: Path, config: DistillConfig) -> None:
    """Refuses a teacher that cannot teach this student, before any weights are read."""
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (student, teacher)]
    if vocabularies[0] != vocabularies[1]:
        raise StrategyError(
            "distill: teacher and student have different tokenizers, so their logits do not speak of the same tokens; "
            "choose a teacher of the same family"
        )
    sizes = [read_config(folder).hidden_size for folder in (student, teacher)]
    if config.hidden_weight and sizes[0] != sizes[1]:
        raise StrategyError(
            f"distill: the student's hidden states have {sizes[0]} values and the teacher's {sizes[1]}, so they cannot "
            "be matched; set hidden_weight: 0, or choose a teacher of the same width"
        )


def distillation_loss(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: DistillConfig, origins: Sequence[int] = ()
) -> Loss:
    """The loss w · T² · D(teacher, student) + (1 − w) · cross-entropy + h · distance of hidden states, in nats.

    All terms are means over answer tokens. T² keeps the size of the gradient independent of the temperature (Hinton et
    al., section 2). On an answer of the student's own there is nothing to take a cross-entropy with.

    Args:
        teacher: float model with the same vocabulary; not changed.
        tokenizer: of both.
        config: w, T, D, h, and the share of batches that the student answers by itself.
        origins: the teacher's layer for each of the student's, where h is not 0.
    """
    teacher.eval()

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        on_policy = bool(config.on_policy_share) and model.training and torch.rand(()).item() < config.on_policy_share
        if on_policy:
            batch = own_answers(cast("PreTrainedModel", model), tokenizer, batch, config)
        states, targets = answer_states(model, batch, every_layer=bool(config.hidden_weight))
        with torch.no_grad():
            taught, _ = answer_states(teacher, batch, every_layer=bool(config.hidden_weight))
            teacher_logits = answer_vocabulary(teacher, taught[-1])
        logits = answer_vocabulary(model, states[-1])
        soft = divergence(teacher_logits / config.temperature, logits / config.temperature, config.divergence)
        total = config.kl_weight * config.temperature**2 * soft
        if not on_policy:
            total = total + (1.0 - config.kl_weight) * cross_entropy(logits, targets)
        if config.hidden_weight:
            total = total + config.hidden_weight * hidden_distance(states, taught, origins)
        return total

    return loss


def stored_distillation_loss(stored: StoredLogits, config: DistillConfig) -> Loss:
    """`distillation_loss` by forward KL over the teacher's likeliest tokens and one bucket of all others."""

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        logits, targets = answer_logits(model, batch)
        teacher, tokens = stored.of(batch)
        soft = _kl(teacher, buckets(logits / config.temperature, tokens))
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


@torch.no_grad()
def own_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Batch, config: DistillConfig
) -> Batch:
    """`batch` with answers drawn from `model` in place of the right ones (GKD, arXiv 2306.13649, algorithm 1).

    Drawn from torch's global random numbers, which a checkpoint keeps, at `config.sample_temperature`, up to an end
    token or `config.sample_tokens`. The model is left in training mode.
    """
    asked = (batch["attention_mask"] == 1) & (batch["labels"] == IGNORED)
    prompts = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], asked, strict=True)]
    pad, ends, longest = pad_id(tokenizer), end_ids(tokenizer, model.generation_config), max(map(len, prompts))
    where = batch["input_ids"].device
    model.eval()
    drawn = cast("Any", model).generate(
        input_ids=torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=where),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=where),
        generation_config=GenerationConfig(
            do_sample=True,
            temperature=config.sample_temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=config.sample_tokens,
            pad_token_id=pad,
            eos_token_id=ends,
        ),
    )
    model.train()
    answers = [_until(ends, row) for row in drawn[:, longest:].tolist()]
    examples = [Example(p + a, [IGNORED] * len(p) + a) for p, a in zip(prompts, answers, strict=True)]
    return {name: tensor.to(where) for name, tensor in collate(examples, pad).items()}


def _until(ends: Sequence[int], ids: list[int]) -> list[int]:
    last = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: last + 1]


def hidden_distance(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], origins: Sequence[int]
) -> torch.Tensor:
    """The mean over layers of ‖student − teacher‖² / ‖teacher‖², a scalar; 0 where all hidden states agree.

    Relative, because what goes from layer to layer grows two hundredfold on the way: plain squared errors would be the
    last layers' alone. What the last layer puts out is left to the logits: it is only seen through the final norm.

    Args:
        student: float tensors (tokens, hidden size), the inputs of its layers and the final norm's output.
        teacher: likewise.
        origins: the teacher's layer for each of the student's.
    """
    pairs = [(student[i + 1].float(), teacher[origin + 1].float()) for i, origin in enumerate(origins[:-1])]
    return torch.stack([mse_loss(own, other) / other.square().mean() for own, other in pairs]).mean()


def layer_origins(student: Path, teacher: Path) -> list[int]:
    """The teacher's layer that each layer of the student was, by what the manifests between them say was removed.

    Evenly spaced, ending with the last, where the manifests do not account for all of them.
    """
    layers, teacher_layers = (read_config(folder).num_hidden_layers for folder in (student, teacher))
    origins = list(range(teacher_layers))
    for removed in reversed(_removals(student, teacher)):
        origins = [origin for index, origin in enumerate(origins) if index not in removed]
    if len(origins) != layers:
        return [round((index + 1) * teacher_layers / layers) - 1 for index in range(layers)]
    return origins


def _removals(student: Path, teacher: Path) -> list[list[int]]:
    """The layers removed by each step that leads from `teacher` to `student`, the latest first."""
    removals = []
    while student != teacher:
        manifest = read_manifest(student)
        removals.append(manifest.facts.get("removed_layers", []))
        if manifest.parent is None:
            return []  # the teacher is no ancestor
        student = student.parent / manifest.parent
    return removals
