"""A mixture of experts merged from branches of one parent (Sukhbaatar et al., Branch-Train-MiX, arXiv 2403.07816).

The training questions are split into topics without labels (Gururangan et al., c-BTM, arXiv 2303.14177). Each topic has
a branch of its own, a LoRA of the parent. The branches' feed-forward layers become the experts of each layer, all other
weights are averaged, and routers are derived from each topic's hidden states, then trained for a few steps alone.

The architecture is Mixtral, or Qwen3-MoE where queries and keys are normed. In both the weights of a token's experts
sum to 1, so that a mixture of equal branches is the branch, whatever its routers say.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import eye_array, kron, vstack
from torch.nn.functional import normalize, one_hot
from tqdm import tqdm
from transformers import MixtralConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen3MoeConfig

from lilliput.chat.template import pad_id
from lilliput.compress.lora import lora
from lilliput.compress.mixture import (
    active_parameters,
    empty_mixture,
    feed_forward_inputs,
    fit_router,
    kept_settings,
    require_same,
    set_active,
)
from lilliput.compress.result import Result
from lilliput.config import ExpertsConfig
from lilliput.data.questions import Question
from lilliput.errors import StrategyError
from lilliput.models import Opened, decoder_layers, open_model
from lilliput.statistics.perplexity import IGNORED
from lilliput.training.answer_loss import answer_states, label_loss
from lilliput.training.examples import collate, encode_examples, lazy_examples
from lilliput.training.loop import History, outcome, set_aside, train

Topics = list[list[Question]]

RESTARTS = 4  # of the clustering, of which the best is taken
ROUNDS = 10  # of each, at most
ROUTER_QUESTIONS = 64  # of each topic: half to derive the routers from, half to tell where tokens go
RIDGE = 1e-1  # of the mean diagonal of XᵀX


def experts(
    parent: Path,
    questions: Sequence[Question],
    system_prompt: str,
    config: ExpertsConfig,
    checkpoints: Path | None = None,
) -> Result:
    """A mixture of branches of the model in `parent`, each trained on its topic of `questions`.

    All branches start from the same adapter, drawn from `config.seed`.

    Args:
        parent: folder of a float checkpoint.
        questions: training questions with their answers.
        system_prompt: the system line before each question.
        config: how many topics, how many experts for a token, schedules and seed.
        checkpoints: where killed trainings go on from, a folder for each (see `train`).

    Raises:
        StrategyError: the architecture cannot stand for the parent, or there are too few questions for the topics.
    """
    opened = open_model(parent)
    mixture, tokenizer = mixture_of(opened, config.experts), opened[1]
    topics = split(opened, questions, system_prompt, config)
    del opened
    history: History = {}
    for number, topic in enumerate(topics):
        branch = lora(parent, topic, system_prompt, config.branch, checkpoints and checkpoints / f"branch-{number + 1}")
        add_branch(mixture, branch.model, number)
        history |= {f"{name}_branch_{number + 1}": curve for name, curve in branch.history.items()}
    drawn = [random.Random(config.seed).sample(topic, min(len(topic), ROUTER_QUESTIONS)) for topic in topics]
    derive_routers(mixture, tokenizer, system_prompt, [sample[::2] for sample in drawn])
    facts: dict[str, Any] = {
        "questions_per_topic": [len(topic) for topic in topics],
        "branch_losses": [history[f"loss_branch_{number + 1}"][-1][1] for number in range(len(topics))],
    }
    if config.router_steps:
        learnt = train_routers(mixture, tokenizer, questions, system_prompt, config, checkpoints)
        facts |= outcome(learnt, config.router)
        history |= learnt
    set_active(mixture, config.active)
    routes = routed(mixture, tokenizer, system_prompt, [sample[1::2] for sample in drawn])
    facts |= {
        "active_parameters": active_parameters(mixture),
        "tokens_by_expert": routes.sum(1).mean(0).tolist(),
        "own_expert_share": config.active * routes.diagonal(dim1=1, dim2=2).sum(1).mean().item(),
    }
    busiest = routes.sum(1).max(1).values.tolist()
    return Result(mixture, tokenizer, facts, history | {"busiest_expert_share": list(enumerate(busiest))})


def mixture_of(opened: Opened, count: int) -> PreTrainedModel:
    """A mixture of `count` times the same experts, the feed-forward layers of the model, all of them active.

    Raises:
        StrategyError: it would not compute what the model does.
    """
    dense, tokenizer = opened
    mixture = empty_mixture(dense, _mixture_config(dense, count))
    for number in range(count):
        add_branch(mixture, dense, number)
    require_same(dense, mixture, tokenizer)
    return mixture


def _mixture_config(dense: PreTrainedModel, count: int) -> PretrainedConfig:
    normed = hasattr(cast("Any", decoder_layers(dense)[0]).self_attn, "q_norm")
    kept = kept_settings(dense, "Qwen3-MoE" if normed else "Mixtral")
    if normed:
        neurons = {"moe_intermediate_size": kept["intermediate_size"], "norm_topk_prob": True}
        return Qwen3MoeConfig(**kept, **neurons, num_experts=count, num_experts_per_tok=count)
    return MixtralConfig(**kept, num_local_experts=count, num_experts_per_tok=count)


@torch.no_grad()
def add_branch(mixture: PreTrainedModel, branch: PreTrainedModel, number: int) -> None:
    """Makes the feed-forward layers of `branch` expert `number` and its other weights part of the mean of 0 … `number`.

    Branches are added in order, so that one of them has to be in memory at a time.
    """
    for target, source in zip(decoder_layers(mixture), decoder_layers(branch), strict=True):
        expert, mlp = cast("Any", target.mlp).experts, cast("Any", source.mlp)
        expert.gate_up_proj[number].copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        expert.down_proj[number].copy_(mlp.down_proj.weight)
    theirs = dict(branch.named_parameters())
    for name, weight in mixture.named_parameters():
        if ".mlp." not in name:
            weight.lerp_(theirs[name], 1 / (number + 1))


def split(opened: Opened, questions: Sequence[Question], system_prompt: str, config: ExpertsConfig) -> Topics:
    """`questions` by topic, as many of each: those that the model is about to answer alike go together.

    A question is told by the last hidden state before its answer. It says what kind of thing comes next, and groups the
    same whatever clustering starts from; a training group (an entity) is not kept together, since nothing is measured
    on these questions.

    Raises:
        StrategyError: there are fewer than two questions for each topic.
    """
    if len(questions) < 2 * config.experts:
        raise StrategyError(
            f"strategies.experts: {len(questions)} training questions are too few for {config.experts} topics of two "
            "or more; lower `experts` or give more questions"
        )
    states = before_answers(opened, questions, system_prompt, config.batch_size)
    vectors = normalize(states - states.mean(0), dim=1).double().cpu().numpy()
    owner = balanced_clusters(vectors, config.experts, config.seed)
    return [[q for q, own in zip(questions, owner, strict=True) if own == topic] for topic in range(config.experts)]


@torch.inference_mode()
def before_answers(opened: Opened, questions: Sequence[Question], system_prompt: str, batch_size: int) -> torch.Tensor:
    """The last hidden state from which the answer to each question begins, float (questions, hidden size)."""
    model, tokenizer = opened
    examples = encode_examples(tokenizer, system_prompt, questions)
    where, firsts = next(model.parameters()).device, []
    for start in tqdm(range(0, len(examples), batch_size), desc="read", unit="batch"):
        batch = collate(examples[start : start + batch_size], pad_id(tokenizer))
        lengths = (batch["labels"][:, 1:] != IGNORED).sum(1).tolist()
        states, _ = answer_states(model, {name: tensor.to(where) for name, tensor in batch.items()})
        firsts += [answer[0] for answer in states[-1].split(lengths)]
    return torch.stack(firsts)


def balanced_clusters(vectors: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Balanced k-means in cosine similarity (c-BTM, section 3.1), the best of a few starts from vectors drawn.

    Args:
        vectors: of length 1, float64 (vectors, size).
        count: of clusters; at most as many as vectors.
        seed: of the draws.

    Returns:
        The cluster of each vector, int64 (vectors,); no two differ in size by more than one.
    """
    rng = np.random.default_rng(seed)
    best, best_likeness = np.empty(0, dtype=int), -np.inf
    for _ in range(RESTARTS):
        centres, owner = vectors[rng.choice(len(vectors), count, replace=False)], None
        for _ in range(ROUNDS):
            before, owner = owner, _share_out(vectors @ centres.T)
            if before is not None and np.array_equal(before, owner):
                break
            sums = np.stack([vectors[owner == cluster].sum(0) for cluster in range(count)])
            centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
        assert owner is not None
        if (likeness := float((vectors * centres[owner]).sum())) > best_likeness:
            best, best_likeness = owner, likeness
    return best


def _share_out(likeness: np.ndarray) -> np.ndarray:
    """The cluster of each row so that likeness sums to the most possible among clusters of one size.

    A transport problem, whose corners are whole numbers: linear programming finds one of them.
    """
    rows, clusters = likeness.shape
    sizes = kron(np.ones((1, rows)), eye_array(clusters))
    solved = linprog(
        -likeness.ravel(),
        A_ub=vstack([sizes, -sizes]),
        b_ub=np.repeat([-(-rows // clusters), -(rows // clusters)], clusters),
        A_eq=kron(eye_array(rows), np.ones((1, clusters))),
        b_eq=np.ones(rows),
        method="highs-ds",
    )
    return solved.x.reshape(rows, clusters).argmax(1)


def derive_routers(
    mixture: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system_prompt: str, topics: Topics
) -> None:
    """Sets the routers of `mixture`, so far all zero, to tell the tokens of `topics` apart, in place.

    They are the mean hidden states of the topics, as in mergekit's `hidden` gates, decorrelated over all tokens: ridge
    regression of a token's topic on what goes into the feed-forward layer when all experts count alike.
    """
    states, owner = _token_states(mixture, tokenizer, system_prompt, topics)
    topic, counts = one_hot(owner, len(topics)).float(), torch.ones(len(owner), 1, device=owner.device)
    for layer, inputs in zip(decoder_layers(mixture), states, strict=True):
        cast("Any", layer.mlp).gate.weight.data.copy_(fit_router(inputs, topic, counts, RIDGE, logit_rms=1.0))


def train_routers(
    mixture: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    system_prompt: str,
    config: ExpertsConfig,
    checkpoints: Path | None,
) -> History:
    """The loss curves of training the routers of `mixture` alone, in place, on all `questions`.

    A single active expert weighs 1 whatever its logit, so that nothing could be learnt: at least two are active here.
    """
    for name, weight in mixture.named_parameters():
        weight.requires_grad_(name.endswith(".mlp.gate.weight"))
    set_active(mixture, max(2, config.active))
    learnt, validated = (lazy_examples(tokenizer, system_prompt, part) for part in set_aside(questions, config))
    folder = checkpoints and checkpoints / "routers"
    history = train(mixture.train(), learnt, pad_id(tokenizer), config.router, label_loss, validated, folder)
    mixture.eval()
    return history


def routed(
    mixture: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system_prompt: str, topics: Topics
) -> torch.Tensor:
    """Where the tokens of each topic go: shares of all choices in a layer, float (layers, topics, experts)."""
    states, owner = _token_states(mixture, tokenizer, system_prompt, topics)
    shares = []
    for layer, inputs in zip(decoder_layers(mixture), states, strict=True):
        gate = cast("Any", layer.mlp).gate
        chosen = (inputs @ gate.weight.data.T).topk(gate.top_k, dim=1).indices
        pairs = owner[:, None] * len(topics) + chosen
        counts = pairs.flatten().bincount(minlength=len(topics) ** 2).float()
        shares.append((counts / counts.sum()).reshape(len(topics), len(topics)))
    return torch.stack(shares)


def _token_states(
    mixture: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system_prompt: str, topics: Topics
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What goes into each feed-forward layer, (tokens, hidden size), and the topic of each token, (tokens,).

    What all questions begin with belongs to no topic and is left out.
    """
    rows = [(number, question) for number, topic in enumerate(topics) for question in topic]
    examples = encode_examples(tokenizer, system_prompt, [question for _, question in rows])
    inputs = feed_forward_inputs(mixture, [example.input_ids for example in examples])
    own = inputs.texts >= 0
    topic = torch.tensor([number for number, _ in rows], device=own.device)
    return [states[own] for states in inputs.states], topic[inputs.texts[own]]
