"""A mixture of experts merged from branches of one parent (Sukhbaatar et al., Branch-Train-MiX, arXiv 2403.07816).

The training questions are clustered into topics without labels (Gururangan et al., c-BTM, arXiv 2303.14177). A branch
of the parent is fine-tuned with LoRA on each topic. The feed-forward layers of the branches become the experts of each
layer; all other weights are averaged. Routers are computed from the hidden states of each topic, then trained alone for
a few steps.

The architecture is Mixtral, or Qwen3-MoE if queries and keys are normed. In both, the weights of a token's experts sum
to 1, so a mixture of equal branches computes the same as the branch with any router.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import eye_array, kron, vstack
from torch.nn.functional import normalize, one_hot
from tqdm import tqdm
from transformers import MixtralConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen3MoeConfig

from lilliput.chat.template import pad_id
from lilliput.compress.context import Context
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
from lilliput.config import ExpertsConfig, LoraConfig, TrainingConfig
from lilliput.data.rows import Row
from lilliput.decoders import decoder_layers
from lilliput.errors import StrategyError
from lilliput.models import Opened, open_model
from lilliput.statistics.perplexity import IGNORED
from lilliput.training.answer_loss import answer_states, label_loss
from lilliput.training.examples import collate, encode_examples
from lilliput.training.history import History
from lilliput.training.loop import train, training_examples, training_facts

Topics = list[list[Row]]

RESTARTS = 4  # of the clustering; the best result is used
ROUNDS = 10  # maximum per restart
ROUTER_QUESTIONS = 64  # per topic: half to compute the routers, half to measure the routing
RIDGE = 1e-1  # as a share of the mean diagonal of XᵀX


def experts(context: Context, config: ExpertsConfig) -> Result:
    """Returns a mixture of branches of the parent, each trained on one topic of the training questions.

    All branches start from the same adapter, drawn from `config.seed`.

    Raises:
        StrategyError: the architecture cannot represent the parent, or there are too few questions for the topics.
    """
    system_prompt = context.system_prompt
    opened = open_model(context.parent)
    mixture, tokenizer = mixture_of(opened, config.experts), opened[1]
    topics = split_into_topics(opened, context.corpus.train, system_prompt, config)
    del opened
    history: History = {}
    for number, topic in enumerate(topics):
        branch = lora(context.for_training(f"branch-{number + 1}", topic), branch_settings(config), open_model)
        add_branch(mixture, branch.model, number)
        history |= {f"{name}_branch_{number + 1}": curve for name, curve in branch.history.items()}
    samples = [random.Random(config.seed).sample(topic, min(len(topic), ROUTER_QUESTIONS)) for topic in topics]
    compute_routers(mixture, tokenizer, system_prompt, [sample[::2] for sample in samples])
    facts: dict[str, Any] = {
        "questions_per_topic": [len(topic) for topic in topics],
        "branch_losses": [history[f"loss_branch_{number + 1}"][-1][1] for number in range(len(topics))],
    }
    if config.router_steps:
        curves = train_routers(mixture, tokenizer, context, config)
        facts |= training_facts(curves, router_settings(config))
        history |= curves
    set_active(mixture, config.active)
    routes = routing_shares(mixture, tokenizer, system_prompt, [sample[1::2] for sample in samples])
    facts |= {
        "active_parameters": active_parameters(mixture),
        "tokens_by_expert": routes.sum(1).mean(0).tolist(),
        "own_expert_share": config.active * routes.diagonal(dim1=1, dim2=2).sum(1).mean().item(),
    }
    busiest = routes.sum(1).max(1).values.tolist()
    return Result(mixture, tokenizer, facts, history | {"busiest_expert_share": list(enumerate(busiest))})


def branch_settings(config: ExpertsConfig) -> LoraConfig:
    """Returns the training settings of each topic's adapter."""
    adapter = {"variant": "lora", "rank": config.rank, "alpha": config.alpha, "dropout": 0.0}
    return LoraConfig(**_training(config), **adapter, target_modules="all-linear", merge=True)


def router_settings(config: ExpertsConfig) -> TrainingConfig:
    """Returns the training settings of the routers, if `router_steps` is not 0."""
    steps = {"steps": config.router_steps, "learning_rate": config.router_learning_rate}
    return TrainingConfig(**_training(config) | steps)


def _training(config: ExpertsConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in TrainingConfig.model_fields}


def mixture_of(opened: Opened, count: int) -> PreTrainedModel:
    """Returns a mixture of `count` equal experts, each the feed-forward layers of the model, all of them active.

    Raises:
        StrategyError: the mixture would compute other logits than the model.
    """
    dense, tokenizer = opened
    mixture = empty_mixture(dense, _mixture_config(dense, count))
    for number in range(count):
        add_branch(mixture, dense, number)
    require_same(dense, mixture, tokenizer)
    return mixture


def _mixture_config(dense: PreTrainedModel, count: int) -> PretrainedConfig:
    normed = hasattr(cast("Any", decoder_layers(dense)[0]).self_attn, "q_norm")
    kept = kept_settings(dense, "qwen3_moe" if normed else "mixtral")
    if normed:
        neurons = {"moe_intermediate_size": kept["intermediate_size"], "norm_topk_prob": True}
        return Qwen3MoeConfig(**kept, **neurons, num_experts=count, num_experts_per_tok=count)
    return MixtralConfig(**kept, num_local_experts=count, num_experts_per_tok=count)


@torch.no_grad()
def add_branch(mixture: PreTrainedModel, branch: PreTrainedModel, number: int) -> None:
    """Adds `branch` to `mixture`, in place: its feed-forward layers as expert `number`, its other weights to the mean.

    Branches must be added in order from 0; this way only one of them is in memory at a time.
    """
    for target, source in zip(decoder_layers(mixture), decoder_layers(branch), strict=True):
        expert, mlp = cast("Any", target.mlp).experts, cast("Any", source.mlp)
        expert.gate_up_proj[number].copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        expert.down_proj[number].copy_(mlp.down_proj.weight)
    branch_weights = dict(branch.named_parameters())
    for name, weight in mixture.named_parameters():
        if ".mlp." not in name:
            weight.lerp_(branch_weights[name], 1 / (number + 1))


def split_into_topics(opened: Opened, questions: Sequence[Row], system_prompt: str, config: ExpertsConfig) -> Topics:
    """Splits `questions` into topics of equal size: questions with similar answers in the model go together.

    The vector of a question is the last hidden state before its answer. It encodes the kind of the next token, and
    leads to the same clusters from any start. Questions of one training group (an entity) may be separated, because
    nothing is measured on them.

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
    return [
        [q for q, number in zip(questions, owner, strict=True) if number == topic] for topic in range(config.experts)
    ]


@torch.inference_mode()
def before_answers(opened: Opened, questions: Sequence[Row], system_prompt: str, batch_size: int) -> torch.Tensor:
    """Returns the last hidden state before the answer to each question, float (questions, hidden size)."""
    model, tokenizer = opened
    examples = encode_examples(tokenizer, system_prompt, questions)
    device, firsts = next(model.parameters()).device, []
    for start in tqdm(range(0, len(examples), batch_size), desc="read", unit="batch"):
        batch = collate(examples[start : start + batch_size], pad_id(tokenizer))
        lengths = (batch["labels"][:, 1:] != IGNORED).sum(1).tolist()
        states, _ = answer_states(model, {name: tensor.to(device) for name, tensor in batch.items()})
        firsts += [answer[0] for answer in states[-1].split(lengths)]
    return torch.stack(firsts)


def balanced_clusters(vectors: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Balanced k-means in cosine similarity (c-BTM, section 3.1): the best of a few restarts from random vectors.

    Args:
        vectors: unit vectors, float64 (vectors, size).
        count: number of clusters; at most the number of vectors.
        seed: of the random starts.

    Returns:
        The cluster of each vector, int64 (vectors,); cluster sizes differ by at most one.
    """
    rng = np.random.default_rng(seed)
    best, best_similarity = np.empty(0, dtype=int), -np.inf
    for _ in range(RESTARTS):
        centres, owner = vectors[rng.choice(len(vectors), count, replace=False)], None
        for _ in range(ROUNDS):
            before, owner = owner, _assign_balanced(vectors @ centres.T)
            if before is not None and np.array_equal(before, owner):
                break
            sums = np.stack([vectors[owner == cluster].sum(0) for cluster in range(count)])
            centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
        assert owner is not None
        if (similarity := float((vectors * centres[owner]).sum())) > best_similarity:
            best, best_similarity = owner, similarity
    return best


def _assign_balanced(similarity: np.ndarray) -> np.ndarray:
    """Returns the cluster of each row that maximises the sum of similarities with clusters of equal size.

    This is a transport problem; its vertices are integers, so linear programming finds an integer solution.
    """
    rows, clusters = similarity.shape
    sizes = kron(np.ones((1, rows)), eye_array(clusters))
    solved = linprog(
        -similarity.ravel(),
        A_ub=vstack([sizes, -sizes]),
        b_ub=np.repeat([-(-rows // clusters), -(rows // clusters)], clusters),
        A_eq=kron(eye_array(rows), np.ones((1, clusters))),
        b_eq=np.ones(rows),
        method="highs-ds",
    )
    return solved.x.reshape(rows, clusters).argmax(1)


def compute_routers(
    mixture: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system_prompt: str, topics: Topics
) -> None:
    """Sets the routers of `mixture`, which are zero, so that they separate the tokens of `topics`, in place.

    The routers are the mean hidden states of the topics, as in mergekit's `hidden` gates, decorrelated over all tokens:
    ridge regression of a token's topic on the input of the feed-forward layer with equal weights for all experts.
    """
    states, owner = _token_states(mixture, tokenizer, system_prompt, topics)
    topic, counts = one_hot(owner, len(topics)).float(), torch.ones(len(owner), 1, device=owner.device)
    for layer, inputs in zip(decoder_layers(mixture), states, strict=True):
        cast("Any", layer.mlp).gate.weight.data.copy_(fit_router(inputs, topic, counts, RIDGE, logit_rms=1.0))


def train_routers(
    mixture: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Context, config: ExpertsConfig
) -> History:
    """Trains only the routers of `mixture`, in place, on all training questions; returns the loss curves.

    At least two experts are active here: a single active expert has weight 1 for any logit, and so no gradient.
    """
    for name, weight in mixture.named_parameters():
        weight.requires_grad_(name.endswith(".mlp.gate.weight"))
    set_active(mixture, max(2, config.active))
    training, validation = training_examples(
        tokenizer, context.system_prompt, context.corpus.train, config, context.turn_rules
    )
    folder, settings = context.checkpoints and context.checkpoints / "routers", router_settings(config)
    history = train(mixture.train(), training, pad_id(tokenizer), settings, label_loss, validation, folder)
    mixture.eval()
    return history


def routing_shares(
    mixture: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system_prompt: str, topics: Topics
) -> torch.Tensor:
    """Returns the shares of a layer's choices by topic and expert, float (layers, topics, experts)."""
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
    """Returns the inputs of each feed-forward layer, (tokens, hidden size), and the topic of each token, (tokens,).

    The common prefix of all questions belongs to no topic and is left out.
    """
    rows = [(number, question) for number, topic in enumerate(topics) for question in topic]
    examples = encode_examples(tokenizer, system_prompt, [question for _, question in rows])
    inputs = feed_forward_inputs(mixture, [example.input_ids for example in examples])
    after_prefix = inputs.texts >= 0
    topic = torch.tensor([number for number, _ in rows], device=after_prefix.device)
    return [states[after_prefix] for states in inputs.states], topic[inputs.texts[after_prefix]]
