"""What every mixture of experts made from a dense model needs, however its experts come about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lilliput.errors import StrategyError
from lilliput.models import decoder_layers, parameter_count, probe_logits, random_model, stored_dtype

_KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)  # keys of a configuration that mean the same in a mixture


@dataclass(frozen=True)
class Inputs:
    """What goes into each feed-forward layer: `states[layer]` is float (tokens, hidden size).

    `counts` (tokens, 1) says how many texts a token stands for: their common beginning is run once. `texts` (tokens,)
    says which one it is of, −1 for that beginning.
    """

    states: list[torch.Tensor]
    counts: torch.Tensor
    texts: torch.Tensor


def kept_settings(dense: PreTrainedModel, architecture: str) -> dict[str, Any]:
    """What the configuration of a mixture takes over from `dense`.

    Raises:
        StrategyError: `dense` is no decoder of plain gated feed-forward layers that attends to everything.
    """
    source = cast("Any", dense.config)
    if missing := [name for name in _KEPT if not hasattr(source, name)]:
        raise unlike(dense, architecture, f"its configuration has no {', '.join(missing)}")
    for layer in decoder_layers(dense):
        linears = [getattr(layer.mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if any(not isinstance(linear, torch.nn.Linear) or linear.bias is not None for linear in linears):
            reason = "its feed-forward layers are not gate, up and down projection without bias"
            raise unlike(dense, architecture, reason)
    if any(kind != "full_attention" for kind in getattr(source, "layer_types", None) or []):
        raise unlike(dense, architecture, "some of its layers attend to a window")
    if getattr(source, "sliding_window", None) and getattr(source, "use_sliding_window", True):
        raise unlike(dense, architecture, f"it attends to a window of {source.sliding_window} tokens")
    head_dim = cast("Any", decoder_layers(dense)[0]).self_attn.head_dim
    return {name: getattr(source, name) for name in _KEPT} | {"head_dim": head_dim}


def empty_mixture(dense: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A mixture of the shape `config` with all of `dense` but its feed-forward layers, and routers of zero.

    Raises:
        StrategyError: the other parts of `dense` have no place in it.
    """
    mixture = random_model(config, seed=0).eval()
    cast("torch.nn.Module", mixture).to(next(dense.parameters()).device)
    keys = mixture.load_state_dict(dense.state_dict(), strict=False)
    if strange := [key for key in (*keys.missing_keys, *keys.unexpected_keys) if ".mlp." not in key]:
        raise unlike(dense, config.model_type, f"its parts differ: {', '.join(strange[:3])}")
    for layer in decoder_layers(mixture):
        cast("Any", layer.mlp).gate.weight.data.zero_()
    mixture.generation_config = dense.generation_config
    cast("Any", mixture).stored_dtype = stored_dtype(dense)
    return mixture


def set_active(mixture: PreTrainedModel, active: int) -> None:
    """Lets the routers of `mixture` choose `active` experts for a token, here and when it is reopened."""
    cast("Any", mixture.config).num_experts_per_tok = active
    for layer in decoder_layers(mixture):
        cast("Any", layer.mlp).gate.top_k = active


def active_parameters(mixture: PreTrainedModel) -> int:
    """Distinct parameters that one token is computed with: all but those of the experts it is not sent to."""
    modules = [cast("Any", layer.mlp).experts for layer in decoder_layers(mixture)]
    active = cast("Any", mixture.config).num_experts_per_tok
    return parameter_count(mixture) - sum(
        parameter_count(experts) // experts.num_experts * (experts.num_experts - active) for experts in modules
    )


def feed_forward_inputs(model: PreTrainedModel, texts: Sequence[list[int]]) -> Inputs:
    """What goes into the feed-forward part of each decoder layer when `model` reads `texts`."""
    seen: list[list[torch.Tensor]] = [[] for _ in decoder_layers(model)]
    handles = [
        cast("Any", layer.mlp).register_forward_pre_hook(lambda _, args, of=of: of.append(args[0][0].clone()))
        for layer, of in zip(decoder_layers(model), seen, strict=True)
    ]
    try:
        tokens = torch.tensor([len(states) for states in read(model, texts)])
    finally:
        for handle in handles:
            handle.remove()
    owners = torch.arange(-1, len(texts)).repeat_interleave(tokens).to(next(model.parameters()).device)
    counts = torch.where(owners < 0, float(len(texts)), 1.0)[:, None]
    return Inputs([torch.cat(parts) for parts in seen], counts, owners)


def fit_router(
    states: torch.Tensor, mass: torch.Tensor, counts: torch.Tensor, ridge: float, logit_rms: float
) -> torch.Tensor:
    """Linear scores that tell which experts give most: ridge regression of how far each lies above their mean.

    The closed form W = (XᵀX + λI)⁻¹ XᵀY takes the place of CMoE's router, the gate and up projections of one
    representative neuron an expert, which is not linear and so has no place in a plain architecture.

    Args:
        states: X, (tokens, hidden size).
        mass: what each expert gives to each token, (tokens, experts).
        counts: how often each token is there, (tokens, 1).
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
def read(model: PreTrainedModel, texts: Sequence[list[int]]) -> Iterator[torch.Tensor]:
    """Last hidden states, float (tokens, hidden size), of the common beginning of `texts` and of the rest of each.

    The beginning is run once, and its keys and values serve all texts. It may be empty; the rest of a text is not.
    """
    where, width = next(model.parameters()).device, cast("Any", model.config).hidden_size
    shared = _common_beginning(texts)
    cache = DynamicCache(config=model.config)
    for text in tqdm([texts[0][:shared], *(text[shared:] for text in texts)], desc="read", unit="text"):
        if not text:
            yield torch.empty(0, width, device=where)
            continue
        ids = torch.tensor([text], device=where)
        output = cast("Any", model.model)(input_ids=ids, past_key_values=cache, use_cache=True)
        if cache.get_seq_length() > shared:
            cache.crop(shared - cache.get_seq_length())
        yield output.last_hidden_state[0]


def _common_beginning(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with; at least the last one of each is left to be run."""
    together = zip(*(text[:-1] for text in texts), strict=False)
    return next((place for place, tokens in enumerate(together) if len(set(tokens)) > 1), min(map(len, texts)) - 1)


def require_same(dense: PreTrainedModel, mixture: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises StrategyError unless `mixture`, its experts amounting to the dense layers, computes what `dense` does."""
    expected = probe_logits(dense, tokenizer)
    difference = (probe_logits(mixture, tokenizer) - expected).abs().max().item()
    if not difference <= 1e-3 * expected.abs().max().item():
        raise unlike(dense, mixture.config.model_type, f"a logit differs by {difference:.3g}")


def unlike(dense: PreTrainedModel, architecture: str, reason: str) -> StrategyError:
    """The refusal of a parent that no mixture of this architecture can stand for."""
    return StrategyError(
        f"a {type(dense).__name__} cannot be written as a mixture of the architecture {architecture}: {reason}; choose "
        "a parent of the Llama or Qwen kind, not yet a mixture"
    )
