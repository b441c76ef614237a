"""Depth pruning by block influence (Men et al., ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from lilliput.compress.result import Result
from lilliput.compress.training import collate, encode_examples
from lilliput.config import PruneConfig
from lilliput.data.questions import Question
from lilliput.errors import StrategyError
from lilliput.models import Opened, decoder_layers


def prune(parent: Opened, calibration: Sequence[Question], system_prompt: str, config: PruneConfig) -> Result:
    """`parent` without its `config.layers` decoder layers of the lowest block influence, in their old order.

    Raises:
        StrategyError: fewer than one layer would remain.
    """
    model, tokenizer = parent
    total = len(decoder_layers(model))
    if config.layers >= total:
        raise StrategyError(
            f"strategies.prune.layers: {config.layers} of {total} layers cannot be removed; leave at least one"
        )
    examples = encode_examples(tokenizer, system_prompt, calibration[: config.calibration_examples])
    batches = [collate([example], 0) for example in examples]
    influence = block_influence(model, batches)
    removed = sorted(sorted(range(total), key=influence.__getitem__)[: config.layers])
    remove_layers(model, removed)
    facts = {"removed_layers": removed, "layers_before": total, "layers_after": total - len(removed)}
    return Result(model, tokenizer, facts, {"block_influence": list(enumerate(influence))})


@torch.inference_mode()
def block_influence(model: torch.nn.Module, batches: Sequence[dict[str, torch.Tensor]]) -> list[float]:
    """Block influence of each layer i: 1 − E[cos(x_i, x_{i+1})] over all tokens (ShortGPT, eq. 1).

    Args:
        model: a decoder of the Llama kind, in evaluation mode.
        batches: unpadded `input_ids` of shape (1, tokens).
    """
    layers = decoder_layers(model)  # pyright: ignore[reportArgumentType]
    similarity = torch.zeros(len(layers), dtype=torch.float64)
    tokens = 0

    def hook(index: int):  # noqa: ANN202
        def record(_module, inputs, output) -> None:  # noqa: ANN001
            after = output[0] if isinstance(output, tuple) else output
            similarity[index] += cosine_similarity(inputs[0], after, dim=-1).sum().item()

        return record

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        for batch in tqdm(batches, desc="block influence", unit="text"):
            ids = batch["input_ids"].to(next(model.parameters()).device)
            model(input_ids=ids, use_cache=False)
            tokens += ids.numel()
    finally:
        for handle in handles:
            handle.remove()
    return (1.0 - similarity / tokens).tolist()


def remove_layers(model: torch.nn.Module, removed: Sequence[int]) -> None:
    """Takes the decoder layers `removed` out of `model` in place and makes its configuration say so."""
    layers = decoder_layers(model)  # pyright: ignore[reportArgumentType]
    kept = [index for index in range(len(layers)) if index not in set(removed)]
    model.model.layers = torch.nn.ModuleList(layers[index] for index in kept)  # pyright: ignore
    for position, layer in enumerate(model.model.layers):  # pyright: ignore
        layer.self_attn.layer_idx = position  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType] - the KV cache is indexed by it
    config = model.config
    config.num_hidden_layers = len(kept)  # pyright: ignore
    if getattr(config, "layer_types", None):  # one entry a layer (Qwen, Gemma)
        config.layer_types = [config.layer_types[index] for index in kept]  # pyright: ignore
