"""AWQ (Lin et al., arXiv 2306.00978): input channels with large activations are scaled up before rounding to nearest.

The scales are folded into what comes before, so the checkpoint is an ordinary one in AutoGPTQ's format. GPTQModel does
the rounding and packing; its own AWQ does not run on a CPU in float32 and writes another format. Clipping of weights,
which the authors' code adds, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lilliput.compress.packing import open_parent, packed_result, round_to_nearest, rounded
from lilliput.compress.result import Result
from lilliput.config import AwqConfig
from lilliput.data.questions import Question
from lilliput.errors import StrategyError
from lilliput.models import decoder_layers, probe_logits
from lilliput.resident import give_back_memory
from lilliput.training.examples import encode_examples

_GRAM_BYTES = 2**30  # of input statistics held at once; larger models are passed over several times
_SAME_LOGITS = 1e-2  # folding only moves factors between weights; what is left is float32's rounding


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same input, and what writes that input: a norm or a linear layer."""

    writer: torch.nn.Module
    readers: list[torch.nn.Linear]


def awq(
    parent_dir: Path,
    calibration: Sequence[Question],
    held_out: Sequence[Question],
    system_prompt: str,
    config: AwqConfig,
) -> Result:
    """The parent scaled and rounded; embeddings and norms stay in float.

    Args:
        parent_dir: a float checkpoint.
        calibration: what activations are collected on; the first `config.calibration_examples` are used.
        held_out: texts on which perplexity is measured before and after.
        system_prompt: the system line before each question.
        config: grid and search.

    Raises:
        StrategyError: the layers' sizes do not suit the group size, or the architecture does not take folded scales.
    """
    model, parent = open_parent(parent_dir, held_out, system_prompt, config)
    examples = encode_examples(parent.tokenizer, system_prompt, calibration[: config.calibration_examples])
    texts = [example.input_ids for example in examples]
    expected = probe_logits(model, parent.tokenizer)
    errors = scale_model(model, texts, config, parent.dtype)
    difference = (probe_logits(model, parent.tokenizer) - expected).abs().max().item()
    if not difference <= _SAME_LOGITS * expected.abs().max().item():
        raise StrategyError(
            f"apply: awq: folding scales into a {type(model).__name__} changed its logits by {difference:.3g}, so its "
            "norms or projections are not of Llama's kind; choose gptq or rtn"
        )
    scaled = model.state_dict()
    del model
    give_back_memory()
    quantised = round_to_nearest(parent_dir, config, scaled)
    facts = {
        "calibration_tokens": sum(map(len, texts)),
        "error_against_rounding": sum(best / plain if plain else 1.0 for plain, best in errors) / len(errors),
    }
    history = {"awq_layer_error": [(index, best) for index, (_, best) in enumerate(errors)]}
    return packed_result(quantised, parent, config, facts, history)


@torch.no_grad()
def scale_model(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], config: AwqConfig, dtype: torch.dtype
) -> list[tuple[float, float]]:
    """Folds the best scales into `model` in place, which computes the same as before.

    Args:
        model: a decoder of the Llama kind.
        texts: calibration token ids.
        config: grid and search.
        dtype: in which norms will be stored; they are rounded to it here, and their readers make up for it.

    Returns:
        For each decoder layer the error ‖(W − Q) X‖² per token of its scaled groups: by plain rounding, and by AWQ.

    Raises:
        StrategyError: a layer lacks the parts of Llama's.
    """
    layers = [_groups(layer) for layer in decoder_layers(model)]
    needed = max(sum(4 * group.readers[0].in_features ** 2 for group in groups) for groups in layers)
    at_once = max(1, _GRAM_BYTES // needed)
    errors = []
    for start in tqdm(range(0, len(layers), at_once), desc="awq", unit="pass"):
        part = layers[start : start + at_once]
        # Scaling does not change what the model computes, so later passes see the same activations.
        statistics = _input_statistics(model, texts, [group for groups in part for group in groups])
        for groups in part:
            found = [_best_scales(group, *statistics[id(group)], config) for group in groups]
            for group, (scales, _, _) in zip(groups, found, strict=True):
                fold(group, scales, dtype)
            errors.append((sum(plain for _, plain, _ in found), sum(best for _, _, best in found)))
    return errors


def _groups(layer: Any) -> list[Group]:
    """The groups of a layer: what reads the norms, the attention's output, and what the feed-forward part gates.

    With grouped-query attention several heads read one channel of v, so there the output projection is not scaled, as
    in the authors' code.
    """
    try:
        attention, mlp = layer.self_attn, layer.mlp
        before_mlp = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        groups = [
            Group(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            Group(before_mlp, [mlp.gate_proj, mlp.up_proj]),
            Group(mlp.up_proj, [mlp.down_proj]),
        ]
        if attention.v_proj.out_features == attention.o_proj.in_features:
            groups.append(Group(attention.v_proj, [attention.o_proj]))
    except AttributeError as error:
        raise StrategyError(
            f"apply: awq: {type(layer).__name__} has not the parts of a Llama layer ({error}); choose gptq or rtn"
        ) from None
    return groups


def _input_statistics(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], groups: Sequence[Group]
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """E[x xᵀ] (inputs, inputs) and E|x| (inputs,) of each group over all tokens, by the group's id."""
    tokens, where = sum(map(len, texts)), next(model.parameters()).device
    sums = {}
    handles = []
    for group in groups:
        inputs = group.readers[0].in_features
        gram, magnitude = torch.zeros(inputs, inputs, device=where), torch.zeros(inputs, device=where)
        sums[id(group)] = (gram, magnitude)

        def add(_module, args, gram=gram, magnitude=magnitude) -> None:  # noqa: ANN001
            x = args[0].reshape(-1, args[0].shape[-1])
            gram.addmm_(x.T, x, alpha=1 / tokens)
            magnitude.add_(x.abs().sum(0) / tokens)

        handles.append(group.readers[0].register_forward_pre_hook(add))
    try:
        for text in texts:
            model(input_ids=torch.tensor([list(text)], device=where), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _best_scales(
    group: Group, gram: torch.Tensor, magnitude: torch.Tensor, config: AwqConfig
) -> tuple[torch.Tensor, float, float]:
    """The scales s = E|x|^α of least error ‖(Q(W s) s⁻¹ − W) X‖² (eq. 4 and 5), the error at α = 0, and theirs."""
    weight = torch.cat([reader.weight for reader in group.readers])
    tried = []
    for step in range(config.scale_steps):
        scales = magnitude.clamp(min=1e-4).pow(step / config.scale_steps)
        scales = scales / (scales.max() * scales.min()).sqrt()
        difference = rounded(weight * scales, config.bits, config.group_size, config.symmetric) / scales - weight
        tried.append(((difference @ gram * difference).sum().item(), scales))
    best = min(tried, key=lambda one: one[0])
    return best[1], tried[0][0], best[0]


@torch.no_grad()
def fold(group: Group, scales: torch.Tensor, dtype: torch.dtype) -> None:
    """Multiplies what `group`'s layers read by `scales` and divides what they are given by them, in place.

    A norm's weight is rounded to `dtype`, as it will be stored, and the readers take up the difference.
    """
    writer: Any = group.writer
    if isinstance(writer, torch.nn.Linear):
        writer.weight.div_(scales[:, None])
        if writer.bias is not None:
            writer.bias.div_(scales)
    else:
        stored = (writer.weight / scales).to(dtype).float()
        scales = torch.where(stored == 0, scales, writer.weight / stored)
        writer.weight.copy_(stored)
    for reader in group.readers:
        reader.weight.mul_(scales)
