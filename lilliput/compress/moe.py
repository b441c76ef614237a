"""A mixture of experts split from dense feed-forward layers without training (Zhang et al., MoEfication,
arXiv 2110.01786; Pei et al., CMoE, arXiv 2502.04416).

The neurons that contribute most on the calibration text become shared experts, which are always computed. The others
are clustered by the tokens they contribute to, into experts of equal size; a router chooses some of them for each
token. The result is an architecture of plain transformers, GLM-4-MoE, which weights the output of an expert by
2 · sigmoid(router logit). Tiny logits make this weight 1, so that with all experts active the mixture computes the same
as the dense model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import Glm4MoeConfig, PreTrainedModel

from lilliput.compress.context import Context
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
from lilliput.decoders import decoder_layers
from lilliput.errors import StrategyError
from lilliput.models import open_model
from lilliput.shape import expert_numbers

ROUTER_LOGIT_RMS = 1e-3  # gives expert weights of 1 ± 0.0005; float32 still resolves a thousandth of this
RIDGE = 1e-2  # as a share of the mean diagonal of XᵀX
ROUNDS = 5  # maximum of the clustering


@dataclass(frozen=True)
class Carving:
    """A partition of one layer's neurons.

    Attributes:
        shared: indices of the neurons of the shared experts, (neurons,).
        experts: indices of the neurons of the other experts, (experts, neurons).
        router: (experts, hidden size).
        captured: share of all contributions on the calibration text that the active experts compute.
    """

    shared: torch.Tensor
    experts: torch.Tensor
    router: torch.Tensor
    captured: float


def moe(context: Context, config: MoeConfig) -> Result:
    """Returns the parent with every feed-forward layer split into experts: fewer active parameters per token.

    Raises:
        StrategyError: GLM-4-MoE cannot represent the model, or the experts do not divide its neurons evenly.
    """
    dense, tokenizer = open_model(context.parent)
    mixture = empty_mixture(dense, _mixture_config(dense, config))
    examples = context.calibration(tokenizer, config.calibration_examples)
    inputs = feed_forward_inputs(dense, [example.input_ids for example in examples])
    carvings = []
    pairs = zip(decoder_layers(dense), decoder_layers(mixture), inputs.states, strict=True)
    for layer, target, states in tqdm(pairs, desc="carve", unit="layer", total=len(inputs.states)):
        carvings.append(carve(layer.mlp, states, inputs.counts, config))
        _copy_neurons(cast("Any", layer.mlp), cast("Any", target.mlp), carvings[-1])
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
    """Partitions the neurons of a gated feed-forward layer into experts and fits their router.

    The contribution of neuron j to a token is c_j = |a_j| · ‖W_down[:, j]‖; a is the input of the down projection.
    CMoE marks the largest a_j of each token and counts the marks; using the sizes changes the output less.

    Args:
        mlp: gate, up and down projection and activation function.
        states: inputs of the layer, (tokens, hidden size).
        counts: the number of occurrences of each token, (tokens, 1).
        config: numbers of experts, shared experts and active experts.
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
    """Balanced k-means of neurons by the tokens they contribute to, in cosine similarity (CMoE, section 3).

    The first centres are the neurons with the largest contributions. Linear assignment gives equal cluster sizes.

    Args:
        contributions: of each neuron to each token, (tokens, neurons), in descending order of neurons.
        count: number of clusters; divides the number of neurons.

    Returns:
        The cluster of each neuron, int64 (neurons,).
    """
    profiles = normalize(contributions.T, dim=1)
    size = len(profiles) // count
    centres, owner = profiles[:count], None
    for _ in range(ROUNDS):
        similarity = (profiles @ centres.T).double().cpu().numpy().repeat(size, axis=1)
        before, owner = owner, torch.as_tensor(linear_sum_assignment(similarity, maximize=True)[1] // size)
        if before is not None and torch.equal(before, owner):
            break
        centres = normalize(torch.zeros_like(centres).index_add_(0, owner.to(profiles.device), profiles), dim=1)
    assert owner is not None
    return owner.to(contributions.device)


def _mixture_config(dense: PreTrainedModel, config: MoeConfig) -> Glm4MoeConfig:
    kept, attention = kept_settings(dense, "glm4_moe"), cast("Any", decoder_layers(dense)[0]).self_attn
    neurons, parts = kept["intermediate_size"], config.experts + config.shared
    if neurons % parts:
        raise StrategyError(
            f"strategies.moe: {config.experts} experts and {config.shared} shared ones do not divide the {neurons} "
            f"neurons of a layer; {expert_numbers(neurons, config)}"
        )
    # GLM-4 itself rotates only half of each head.
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


def _copy_neurons(dense: Any, mixture: Any, carving: Carving) -> None:
    """Copies the neurons of the feed-forward layer `dense` to their experts in `mixture`."""
    gate, up, down = dense.gate_proj.weight.data, dense.up_proj.weight.data, dense.down_proj.weight.data
    mixture.shared_experts.gate_proj.weight.data.copy_(gate[carving.shared])
    mixture.shared_experts.up_proj.weight.data.copy_(up[carving.shared])
    mixture.shared_experts.down_proj.weight.data.copy_(down[:, carving.shared])
    mixture.experts.gate_up_proj.data.copy_(torch.cat([gate[carving.experts], up[carving.experts]], dim=1))
    mixture.experts.down_proj.data.copy_(down[:, carving.experts].transpose(0, 1))
