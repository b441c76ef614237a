"""Knowledge distillation on logits (Hinton et al., arXiv 1503.02531) with one of three divergences.

Forward KL makes the student cover all tokens that the teacher finds likely. Reverse KL makes it concentrate on the
likeliest ones (Gu et al., MiniLLM, arXiv 2306.08543). Jensen–Shannon lies between them and is bounded. On-policy
batches hold answers sampled from the student, so that it learns from its own mistakes (Agarwal et al., GKD,
arXiv 2306.13649).
The loss may also match hidden states (Jiao et al., TinyBERT, arXiv 1909.10351, eq. 8).
A quantised student learns through its rounding and stays quantised (`through_rounding`).
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
from lilliput.codes import read_codes
from lilliput.compress.context import Context
from lilliput.compress.packing import describe_parent, linears, quantised_result
from lilliput.compress.result import Result
from lilliput.compress.through_rounding import round_in_forward_pass, with_trained_codes
from lilliput.config import DistillConfig
from lilliput.errors import StrategyError
from lilliput.models import open_frozen, open_model, read_config, sharded
from lilliput.statistics.perplexity import IGNORED
from lilliput.training.answer_loss import answer_logits, answer_states, answer_vocabulary
from lilliput.training.examples import Batch, Example, collate, encode_examples
from lilliput.training.loop import (
    Loss,
    main_process_first,
    train,
    training_device,
    training_examples,
    training_facts,
)
from lilliput.training.stored_logits import StoredLogits, buckets, stored_logits


def distill(context: Context, config: DistillConfig) -> Result:
    """Trains all weights of the parent, the student, towards the teacher's next-token distribution on the answers.

    Of a quantised student only the codes are trained.

    Raises:
        StrategyError: teacher and student have different tokenizers, or hidden states of different sizes to match.
    """
    student, teacher = context.parent, context.teacher
    assert teacher is not None, "check_graph requires a teacher"
    _require_compatible(student, teacher, config)
    model, tokenizer = open_model(student)
    torch.manual_seed(config.seed)
    training, validation = training_examples(
        tokenizer, context.system_prompt, context.corpus.train, config, context.turn_rules
    )
    settings = getattr(read_config(student), "quantization_config", None)
    if sharded():
        _require_shardable(config, quantised=settings is not None)
    if config.teacher_logits == "stored":
        facts, loss = {}, stored_distillation_loss(_stored_logits(context, teacher, tokenizer, config), config)
    else:
        origins = layer_origins(student, teacher) if config.hidden_weight else []
        facts = {"matched_teacher_layers": origins} if origins else {}
        opened = cast(PreTrainedModel, cast(torch.nn.Module, open_frozen(teacher)[0]).to(training_device()))
        loss = distillation_loss(opened, tokenizer, config, origins)
    if settings is None:
        history = train(model.train(), training, pad_id(tokenizer), config, loss, validation, context.checkpoints)
        return Result(model.eval(), tokenizer, training_facts(history, config, training) | facts, history)
    parent = describe_parent(model, tokenizer, context)
    round_in_forward_pass(model, read_codes(student), linears(open_frozen(teacher)[0]))
    history = train(model.train(), training, pad_id(tokenizer), config, loss, validation, context.checkpoints)
    facts |= training_facts(history, config, training)
    return quantised_result(with_trained_codes(model.eval()), parent, settings, facts, history)


def _require_shardable(config: DistillConfig, *, quantised: bool) -> None:
    if config.on_policy_share:
        raise StrategyError("on_policy_share: a student sharded by FSDP cannot generate answers; set it to 0")
    if quantised:
        raise StrategyError("distill: FSDP cannot shard a quantised student; train it in one process, or with DDP")


def _require_compatible(student: Path, teacher: Path, config: DistillConfig) -> None:
    """Rejects a teacher that does not fit the student, before any weights are read."""
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (student, teacher)]
    if vocabularies[0] != vocabularies[1]:
        raise StrategyError(
            "distill: teacher and student have different tokenizers, so their logits belong to different tokens; "
            "choose a teacher of the same family"
        )
    sizes = [read_config(folder).hidden_size for folder in (student, teacher)]
    if config.hidden_weight and sizes[0] != sizes[1]:
        raise StrategyError(
            f"distill: the student's hidden states have {sizes[0]} values and the teacher's {sizes[1]}, so they cannot "
            "be matched; set hidden_weight: 0, or choose a teacher of the same width"
        )


def _stored_logits(
    context: Context, teacher: Path, tokenizer: PreTrainedTokenizerBase, config: DistillConfig
) -> StoredLogits:
    """Returns the teacher's likeliest tokens on all training questions, from the cache if they are there."""
    assert context.teacher_logits is not None, "`teacher_logits: stored` requires a folder for the logits"
    sha256 = read_manifest(teacher).artifact_sha256
    examples = encode_examples(tokenizer, context.system_prompt, context.corpus.train, context.turn_rules)
    with main_process_first():
        return stored_logits(
            context.teacher_logits,
            sha256,
            lambda: open_frozen(teacher)[0],
            examples,
            pad_id(tokenizer),
            config.temperature,
            config.top_k,
        )


def distillation_loss(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: DistillConfig, origins: Sequence[int] = ()
) -> Loss:
    """Returns the loss w · T² · D(teacher, student) + (1 − w) · cross-entropy + h · distance of hidden states, in nats.

    All terms are means over answer tokens. T² keeps the size of the gradient independent of the temperature (Hinton et
    al., section 2). Answers sampled from the student have no labels, so on them there is no cross-entropy.

    Args:
        teacher: float model with the same vocabulary; not changed.
        tokenizer: of both models.
        config: w, T, D, h, and the share of on-policy batches.
        origins: the teacher's layer for each layer of the student, if h is not 0.
    """
    teacher.eval()

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        on_policy = bool(config.on_policy_share) and model.training and torch.rand(()).item() < config.on_policy_share
        if on_policy:
            batch = sample_answers(cast("PreTrainedModel", model), tokenizer, batch, config)
        states, targets = answer_states(model, batch, every_layer=bool(config.hidden_weight))
        with torch.no_grad():
            teacher_states, _ = answer_states(teacher, batch, every_layer=bool(config.hidden_weight))
            teacher_logits = answer_vocabulary(teacher, teacher_states[-1])
        logits = answer_vocabulary(model, states[-1])
        soft = divergence(teacher_logits / config.temperature, logits / config.temperature, config.divergence)
        total = config.kl_weight * config.temperature**2 * soft
        if not on_policy:
            total = total + (1.0 - config.kl_weight) * cross_entropy(logits, targets)
        if config.hidden_weight:
            total = total + config.hidden_weight * hidden_distance(states, teacher_states, origins)
        return total

    return loss


def stored_distillation_loss(stored: StoredLogits, config: DistillConfig) -> Loss:
    """Returns `distillation_loss` with forward KL over the teacher's likeliest tokens and one bucket for all others."""

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
    """Returns the mean divergence over tokens between the teacher's and the student's distribution, a scalar in nats.

    With p of the teacher and q of the student: forward KL(p ‖ q), reverse KL(q ‖ p), or Jensen–Shannon
    ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q), at most ln 2.

    Args:
        teacher_logits: float tensor (tokens, vocabulary).
        student_logits: float tensor (tokens, vocabulary).
        kind: the divergence.
    """
    p, q = log_softmax(teacher_logits, dim=-1), log_softmax(student_logits, dim=-1)
    if kind == "forward_kl":
        return _kl(p, q)
    if kind == "reverse_kl":
        return _kl(q, p)
    middle = torch.logaddexp(p, q) - math.log(2.0)
    return 0.5 * (_kl(p, middle) + _kl(q, middle))


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Returns KL(p ‖ q) of log-probabilities."""
    return kl_div(q, p, log_target=True, reduction="batchmean")


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Batch, config: DistillConfig
) -> Batch:
    """Returns `batch` with answers sampled from `model` in place of the labels (GKD, arXiv 2306.13649, algorithm 1).

    Samples with torch's global random state, which a checkpoint stores, at `config.sample_temperature`, up to an end
    token or `config.sample_tokens`. Leaves the model in training mode.
    """
    prompts = [_before_last_answer(*rows) for rows in zip(batch["input_ids"], batch["labels"], strict=True)]
    pad, ends, longest = pad_id(tokenizer), end_ids(tokenizer, model.generation_config), max(map(len, prompts))
    device = batch["input_ids"].device
    model.eval()
    generated = cast("Any", model).generate(
        input_ids=torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device),
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
    answers = [_up_to_end(ends, row) for row in generated[:, longest:].tolist()]
    examples = [Example(p + a, [IGNORED] * len(p) + a) for p, a in zip(prompts, answers, strict=True)]
    return {name: tensor.to(device) for name, tensor in collate(examples, pad).items()}


def _before_last_answer(ids: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """Returns the ids before the last run of labels, which end a text."""
    learnt = labels != IGNORED
    stop = int(learnt.nonzero()[-1])
    before = (~learnt[:stop]).nonzero()
    return ids[: int(before[-1]) + 1].tolist()


def _up_to_end(ends: Sequence[int], ids: list[int]) -> list[int]:
    """Returns `ids` up to and including the first of the tokens `ends`."""
    last = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: last + 1]


def hidden_distance(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], origins: Sequence[int]
) -> torch.Tensor:
    """Returns the mean over layers of ‖student − teacher‖² / ‖teacher‖², a scalar.

    The errors are relative because hidden states grow two hundredfold from the first layer to the last: the last layers
    would dominate plain squared errors. The last layer's output is not matched here: it is only visible after the final
    norm, and the logits depend on it.

    Args:
        student: float tensors (tokens, hidden size): the inputs of its layers and the output of the final norm.
        teacher: the same for the teacher.
        origins: the teacher's layer for each layer of the student.
    """
    pairs = [(student[i + 1].float(), teacher[origin + 1].float()) for i, origin in enumerate(origins[:-1])]
    return torch.stack([mse_loss(ours, theirs) / theirs.square().mean() for ours, theirs in pairs]).mean()


def layer_origins(student: Path, teacher: Path) -> list[int]:
    """Returns for each layer of the student the teacher's layer it comes from, by the removals in the manifests.

    If the manifests do not explain the number of layers, returns evenly spaced layers that end with the last.
    """
    layers, teacher_layers = (read_config(folder).num_hidden_layers for folder in (student, teacher))
    origins = list(range(teacher_layers))
    for removed in reversed(_removals(student, teacher)):
        origins = [origin for index, origin in enumerate(origins) if index not in removed]
    if len(origins) != layers:
        return [round((index + 1) * teacher_layers / layers) - 1 for index in range(layers)]
    return origins


def _removals(student: Path, teacher: Path) -> list[list[int]]:
    """Returns the layers removed by each step from `teacher` to `student`, the latest step first."""
    removals = []
    while student != teacher:
        manifest = read_manifest(student)
        removals.append(manifest.facts.get("removed_layers", []))
        if manifest.parent is None:
            return []  # the teacher is not an ancestor
        student = student.parent / manifest.parent
    return removals
