"""A mixture of experts carved out of dense feed-forward layers, no weight trained (Zhang et al., MoEfication,
arXiv 2110.01786; Pei et al., CMoE, arXiv 2502.04416).

The neurons that give most on the calibration text become shared experts, always computed; the others are clustered by
the tokens they serve into experts of equal size, of which a router computes some for each token. The result is an
architecture of plain transformers: GLM-4-MoE, in which an expert's output is weighed by 2 · sigmoid(router logit). Tiny
logits make that 1, so that with all experts active the mixture computes what the dense model did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import Glm4MoeConfig, PreTrainedModel

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
from lilliput.config import MoeConfig
from lilliput.data.questions import Question
from lilliput.errors import StrategyError
from lilliput.models import Opened, decoder_layers
from lilliput.shape import expert_numbers
from lilliput.training.examples import encode_examples

ROUTER_LOGIT_RMS = 1e-3  # an expert then weighs 1 ± 0.0005, and float32 still tells a thousandth of this apart
RIDGE = 1e-2  # of the mean diagonal of XᵀX
ROUNDS = 5  # of the clustering, at most


@dataclass(frozen=True)
class Carving:
    """One layer's neurons by number: `shared` (neurons,) and `experts` (experts, neurons); `router` (experts, hidden).

    `captured` is the share of the calibration text's contributions that is left when each token has its experts.
    """

    shared: torch.Tensor
    experts: torch.Tensor
    router: torch.Tensor
    captured: float


def moe(parent: Opened, calibration: Sequence[Question], system_prompt: str, config: MoeConfig) -> Result:
    """`parent` with every feed-forward layer split into experts; as many parameters, fewer of them for a token.

    Args:
        parent: float model and tokenizer.
        calibration: the first `config.calibration_examples` are used.
        system_prompt: the system line before each question.
        config: how many experts, and how many are active.

    Raises:
        StrategyError: the model computes what GLM-4-MoE cannot, or its neurons cannot be shared out evenly.
    """
    dense, tokenizer = parent
    mixture = empty_mixture(dense, _mixture_config(dense, config))
    examples = encode_examples(tokenizer, system_prompt, calibration[: config.calibration_examples])
    inputs = feed_forward_inputs(dense, [example.input_ids for example in examples])
    carvings = []
    pairs = zip(decoder_layers(dense), decoder_layers(mixture), inputs.states, strict=True)
    for layer, target, states in tqdm(pairs, desc="carve", unit="layer", total=len(inputs.states)):
        carvings.append(carve(layer.mlp, states, inputs.counts, config))
        _share_out(cast("Any", layer.mlp), cast("Any", target.mlp), carvings[-1])
    require_same(dense, mixture, tokenizer)
    for target, carving in zip(decoder_layers(mixture), carvings, strict=True):
        cast("Any", target.mlp).gate.weight.data.copy_(carving.router)
    set_active(mixture, config.active)
    captured = [carving.captured for carving in carvings]
    facts = {
        "active_parameters": active_parameters(mixture),
        "neurons_per_expert": carvings[0].experts.shape[1],
        "captured_mean": sum(captured) / len(captured),
    }
    return Result(mixture, tokenizer, facts, {"captured": list(enumerate(captured))})


@torch.inference_mode()
def carve(mlp: Any, states: torch.Tensor, counts: torch.Tensor, config: MoeConfig) -> Carving:
    """Which neurons of a gated feed-forward layer go together, and what sends a token to them.

    What neuron j gives to a token's output is taken as c_j = |a_j| · ‖W_down[:, j]‖, where a goes into the down
    projection. CMoE marks each token's largest a_j and counts the marks; the sizes themselves disturb the output less.

    Args:
        mlp: gate, up and down projection and activation function.
        states: what goes into it, (tokens, hidden size).
        counts: how often each token is there, (tokens, 1).
        config: how many experts, shared and active.
    """
    activations = mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states)
    contributions = activations.abs() * mlp.down_proj.weight.norm(dim=0)
    size = contributions.shape[1] // (config.experts + config.shared)
    order = (contributions * counts).sum(0).argsort(descending=True, stable=True)
    shared, routed = order[: config.shared * size].sort().values, order[config.shared * size :]
    owner = cluster(contributions[:, routed] * counts.sqrt(), config.experts)
    experts = torch.stack([routed[owner == expert].sort().values for expert in range(config.experts)])
    mass = contributions[:, experts].sum(2)
    router = fit_router(states, mass, counts, RIDGE, ROUTER_LOGIT_RMS)
    chosen = (states @ router.T).topk(config.active, dim=1).indices
    kept = mass.gather(1, chosen).sum(1, keepdim=True) + contributions[:, shared].sum(1, keepdim=True)
    captured = ((kept * counts).sum() / (contributions * counts).sum()).item()
    return Carving(shared, experts, router, captured)


def cluster(contributions: torch.Tensor, count: int) -> torch.Tensor:
    """Balanced k-means of neurons by the tokens they serve, in cosine similarity (CMoE, section 3).

    It starts from the neurons that give most. Neurons are shared out by linear assignment, each cluster having as many
    places as any other.

    Args:
        contributions: what each neuron gives to each token, (tokens, neurons), the neurons that give most first.
        count: of clusters; divides the neurons.

    Returns:
        The cluster of each neuron, int64 (neurons,).
    """
    profiles = normalize(contributions.T, dim=1)
    size = len(profiles) // count
    centres, owner = profiles[:count], None
    for _ in range(ROUNDS):
        likeness = (profiles @ centres.T).double().cpu().numpy().repeat(size, axis=1)
        before, owner = owner, torch.as_tensor(linear_sum_assignment(likeness, maximize=True)[1] // size)
        if before is not None and torch.equal(before, owner):
            break
        centres = normalize(torch.zeros_like(centres).index_add_(0, owner.to(profiles.device), profiles), dim=1)
    assert owner is not None
    return owner.to(contributions.device)


def _mixture_config(dense: PreTrainedModel, config: MoeConfig) -> Glm4MoeConfig:
    kept, attention = kept_settings(dense, "GLM-4-MoE"), cast("Any", decoder_layers(dense)[0]).self_attn
    neurons, parts = kept["intermediate_size"], config.experts + config.shared
    if neurons % parts:
        raise StrategyError(
            f"strategies.moe: {config.experts} experts and {config.shared} shared ones do not divide the {neurons} "
            f"neurons of a layer; {expert_numbers(neurons, config)}"
        )
    # GLM-4 itself rotates half of a head.
    kept["rope_parameters"] = kept["rope_parameters"] | {"partial_rotary_factor": 1.0}
    return Glm4MoeConfig(
        **kept,
        attention_bias=attention.q_proj.bias is not None,
        use_qk_norm=hasattr(attention, "q_norm"),
        moe_intermediate_size=neurons // parts,
        n_routed_experts=config.experts,
        n_shared_experts=config.shared,
        num_experts_per_tok=config.experts,
        norm_topk_prob=False,
        routed_scaling_factor=2.0,
        first_k_dense_replace=0,
        num_mtp_layers=0,
    )


def _share_out(dense: Any, mixture: Any, carving: Carving) -> None:
    """Copies the neurons of the feed-forward layer `dense` to the experts they belong to."""
    gate, up, down = dense.gate_proj.weight.data, dense.up_proj.weight.data, dense.down_proj.weight.data
    mixture.shared_experts.gate_proj.weight.data.copy_(gate[carving.shared])
    mixture.shared_experts.up_proj.weight.data.copy_(up[carving.shared])
    mixture.shared_experts.down_proj.weight.data.copy_(down[:, carving.shared])
    mixture.experts.gate_up_proj.data.copy_(torch.cat([gate[carving.experts], up[carving.experts]], dim=1))
    mixture.experts.down_proj.data.copy_(down[:, carving.experts].transpose(0, 1))
