"""Shared parts of the strategies that turn a dense model into a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lilliput.chat.template import shared_prefix_length
from lilliput.compress.hooks import registered_hooks
from lilliput.decoders import decoder_layers, parameter_count
from lilliput.errors import StrategyError
from lilliput.models import random_model, stored_dtype
from lilliput.saving import probe_logits
from lilliput.supported_sources import family_name

_KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)  # configuration keys with the same meaning in a dense model and in a mixture


@dataclass(frozen=True)
class Inputs:
    """Inputs of the feed-forward layers over some texts, whose common prefix is run once.

    Attributes:
        states: for each layer float (tokens, hidden size).
        counts: (tokens, 1), the number of texts that share the token.
        texts: (tokens,), the index of the token's text; −1 in the common prefix.
    """

    states: list[torch.Tensor]
    counts: torch.Tensor
    texts: torch.Tensor


def kept_settings(dense: PreTrainedModel, architecture: str) -> dict[str, Any]:
    """Returns the settings that the configuration of a mixture copies from `dense`.

    Raises:
        StrategyError: `dense` is not a decoder with plain gated feed-forward layers and full attention.
    """
    source = cast("Any", dense.config)
    if missing := [name for name in _KEPT if not hasattr(source, name)]:
        raise incompatible(dense, architecture, f"its configuration has no {', '.join(missing)}")
    for layer in decoder_layers(dense):
        linears = [getattr(layer.mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if any(not isinstance(linear, torch.nn.Linear) or linear.bias is not None for linear in linears):
            reason = "its feed-forward layers are not gate, up and down projection without bias"
            raise incompatible(dense, architecture, reason)
    if any(kind != "full_attention" for kind in getattr(source, "layer_types", None) or []):
        raise incompatible(dense, architecture, "some of its layers attend to a window")
    if getattr(source, "sliding_window", None) and getattr(source, "use_sliding_window", True):
        raise incompatible(dense, architecture, f"it attends to a window of {source.sliding_window} tokens")
    head_dim = cast("Any", decoder_layers(dense)[0]).self_attn.head_dim
    return {name: getattr(source, name) for name in _KEPT} | {"head_dim": head_dim}


def empty_mixture(dense: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Returns a mixture of shape `config` with zero routers and all weights of `dense` except its feed-forward layers.

    Raises:
        StrategyError: another part of `dense` has no counterpart in the mixture.
    """
    mixture = random_model(config, seed=0).eval()
    cast("torch.nn.Module", mixture).to(next(dense.parameters()).device)
    weights, own = dense.state_dict(), mixture.state_dict()
    if other := [key for key in weights if key in own and weights[key].shape != own[key].shape]:
        raise incompatible(dense, config.model_type, f"its parts have other sizes: {', '.join(other[:3])}")
    keys = mixture.load_state_dict(weights, strict=False)
    if unmatched := [key for key in (*keys.missing_keys, *keys.unexpected_keys) if ".mlp." not in key]:
        raise incompatible(dense, config.model_type, f"its parts differ: {', '.join(unmatched[:3])}")
    for layer in decoder_layers(mixture):
        cast("Any", layer.mlp).gate.weight.data.zero_()
    mixture.generation_config = dense.generation_config
    cast("Any", mixture).stored_dtype = stored_dtype(dense)
    return mixture


def set_active(mixture: PreTrainedModel, active: int) -> None:
    """Sets the number of experts per token, in the routers of `mixture` and in its configuration."""
    cast("Any", mixture.config).num_experts_per_tok = active
    for layer in decoder_layers(mixture):
        cast("Any", layer.mlp).gate.top_k = active


def active_parameters(mixture: PreTrainedModel) -> int:
    """Returns the number of parameters that compute one token: all except those of its inactive experts."""
    modules = [cast("Any", layer.mlp).experts for layer in decoder_layers(mixture)]
    active = cast("Any", mixture.config).num_experts_per_tok
    return parameter_count(mixture) - sum(
        parameter_count(experts) // experts.num_experts * (experts.num_experts - active) for experts in modules
    )


def feed_forward_inputs(model: PreTrainedModel, texts: Sequence[list[int]]) -> Inputs:
    """Returns the inputs of the feed-forward part of each decoder layer for `texts` (token ids)."""
    recorded: list[list[torch.Tensor]] = [[] for _ in decoder_layers(model)]
    with registered_hooks(
        cast("Any", layer.mlp).register_forward_pre_hook(lambda _, args, to=states: to.append(args[0][0].clone()))
        for layer, states in zip(decoder_layers(model), recorded, strict=True)
    ):
        tokens = torch.tensor([len(states) for states in run_with_shared_prefix(model, texts)])
    owners = torch.arange(-1, len(texts)).repeat_interleave(tokens).to(next(model.parameters()).device)
    counts = torch.where(owners < 0, float(len(texts)), 1.0)[:, None]
    return Inputs([torch.cat(parts) for parts in recorded], counts, owners)


def fit_router(
    states: torch.Tensor, mass: torch.Tensor, counts: torch.Tensor, ridge: float, logit_rms: float
) -> torch.Tensor:
    """Returns a linear router: ridge regression of each expert's contribution minus the mean over experts.

    The closed form W = (XᵀX + λI)⁻¹ XᵀY replaces CMoE's router (the gate and up projections of one representative
    neuron per expert), which is not linear and does not fit into a plain architecture.

    Args:
        states: X, (tokens, hidden size).
        mass: the contribution of each expert to each token, (tokens, experts).
        counts: the number of occurrences of each token, (tokens, 1).
        ridge: λ as a share of the mean diagonal of XᵀX.
        logit_rms: root mean square of the logits.

    Returns:
        Float tensor (experts, hidden size).
    """
    x, y = states.double(), (mass - mass.mean(1, keepdim=True)).double()
    gram = (x * counts).T @ x
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    router = torch.linalg.solve(gram + penalty, (x * counts).T @ y).T
    return (router * (logit_rms / (x @ router.T).square().mean().sqrt())).float()


@torch.inference_mode()
def run_with_shared_prefix(model: PreTrainedModel, texts: Sequence[list[int]]) -> Iterator[torch.Tensor]:
    """Yields last hidden states, float (tokens, hidden size): of the common prefix of `texts`, then of each remainder.

    The prefix is run once and its keys and values are reused. It may be empty; a remainder is never empty.
    """
    device, width = next(model.parameters()).device, cast("Any", model.config).hidden_size
    shared = shared_prefix_length([text[:-1] for text in texts])
    cache = DynamicCache(config=model.config)
    for text in tqdm([texts[0][:shared], *(text[shared:] for text in texts)], desc="read", unit="text"):
        if not text:
            yield torch.empty(0, width, device=device)
            continue
        ids = torch.tensor([text], device=device)
        output = cast("Any", model.model)(input_ids=ids, past_key_values=cache, use_cache=True)
        if cache.get_seq_length() > shared:
            cache.crop(shared - cache.get_seq_length())
        yield output.last_hidden_state[0]


def require_same(dense: PreTrainedModel, mixture: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises StrategyError unless `mixture`, with all experts active, computes the logits of `dense`."""
    expected = probe_logits(dense, tokenizer)
    difference = (probe_logits(mixture, tokenizer) - expected).abs().max().item()
    if not difference <= 1e-3 * expected.abs().max().item():
        raise incompatible(dense, mixture.config.model_type, f"a logit differs by {difference:.3g}")


def incompatible(dense: PreTrainedModel, architecture: str, reason: str) -> StrategyError:
    """Returns the error for a parent that a mixture of this architecture cannot represent, named as in transformers."""
    return StrategyError(
        f"the parent (family: {family_name(dense.config.model_type)}) cannot be written as a mixture of the "
        f"architecture {family_name(architecture)}: {reason}; choose a parent of the Llama or Qwen3 kind without "
        "biases, not yet a mixture"
    )
