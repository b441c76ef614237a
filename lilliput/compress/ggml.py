"""GGUF's own types, as llama.cpp's quantiser writes them, weighted by importance from calibration text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.compress.autogptq_format import write_packed
from lilliput.compress.context import Context
from lilliput.compress.importance import mean_squared_inputs
from lilliput.compress.packing import describe_parent, linears, require_linear
from lilliput.compress.result import Result
from lilliput.config import GgmlConfig
from lilliput.decoders import decoder_layers
from lilliput.errors import StrategyError
from lilliput.ggml.blocks import PART, Blocks, settings_of_blocks
from lilliput.ggml.quantiser import quantise
from lilliput.ggml.rules import Matrix, Part, describe_decoder, fitting_type, matrix_type, problem
from lilliput.models import open_model
from lilliput.packed_texts import pack_texts
from lilliput.statistics.perplexity import counted, perplexity

_BATCH_TOKENS = 8192  # of activations in memory at once
_PARTS = {  # by the last part of a linear layer's name
    "q_proj": Part.QUERY,
    "k_proj": Part.KEY,
    "v_proj": Part.VALUE,
    "qkv_proj": Part.VALUE,
    "o_proj": Part.ATTENTION_OUTPUT,
    "dense": Part.ATTENTION_OUTPUT,
    "gate_proj": Part.GATE,
    "up_proj": Part.UP,
    "gate_up_proj": Part.UP,
    "fc1": Part.UP,
    "c_fc": Part.UP,
    "down_proj": Part.DOWN,
    "fc2": Part.DOWN,
    "c_proj": Part.DOWN,
}


def ggml(context: Context, config: GgmlConfig) -> Result:
    """Returns the parent with all matrices in GGUF types: those and the bytes that llama.cpp's quantiser would write.

    Norms and biases stay in float. As in llama.cpp, embeddings and output are rounded without importance.

    Raises:
        StrategyError: the sizes of the layers do not allow the type, llama.cpp's rules do not cover a layer, or a layer
            cannot be written.
    """
    model, tokenizer = open_model(context.parent)
    require_linear(model)
    matrices = _matrices(model)
    kinds = _kinds(model, matrices, config)
    parent = describe_parent(model, tokenizer, context)
    importance, facts = _importance(model, tokenizer, context, config)
    packed, error = _quantise(model, kinds, importance)
    save = partial(
        write_packed,
        model=model,
        tokenizer=tokenizer,
        packed=packed,
        settings=settings_of_blocks(config.type, kinds),
        dtype=parent.dtype,
    )
    facts |= {
        "type": config.type,
        "importance": config.importance,
        "bits": 8 * _bytes(packed) / sum(model.get_submodule(name).weight.numel() for name in kinds),  # pyright: ignore
        "matrices_by_type": dict(sorted(Counter(kind.name for kind in kinds.values()).items())),
        "other_types_for_width": _fallbacks(model, matrices, kinds, config),
        "rounding_error": error,
        "perplexity_before": parent.perplexity,
        "perplexity_after": perplexity(model, parent.texts),
        "perplexity_tokens": counted(parent.texts),
        "parameters": parent.parameters,
    }
    return Result(model, tokenizer, facts, save=save)


def _matrices(model: PreTrainedModel) -> dict[str, Matrix]:
    """Returns all matrices of `model` by the name of their module.

    Raises:
        StrategyError: llama.cpp's rules for a layer are not known.
    """
    names = {module: name for name, module in model.named_modules()}
    inside = linears(model)
    found = {}
    for number, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if (name := names[module]) in inside:
                part = _PARTS.get(name.rpartition(".")[2])
                if part is None:
                    raise _not_covered(name)
                found[name] = Matrix(part, inside[name].in_features, number)
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    found[names[table]] = Matrix(Part.TABLE, model.config.hidden_size)
    if not model.config.tie_word_embeddings:
        found[names[output]] = Matrix(Part.OUTPUT, model.config.hidden_size)
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    covered = found.keys() | {names[output]}
    if others := [name for module, name in names.items() if isinstance(module, kinds) and name not in covered]:
        raise _not_covered(others[0])
    return found


def _not_covered(name: str) -> StrategyError:
    return StrategyError(
        f"{name}: which type llama.cpp gives this layer is not known here (known are the layers of dense decoders of "
        "the Llama kind); choose rtn or gptq for this model"
    )


def _kinds(model: PreTrainedModel, matrices: Mapping[str, Matrix], config: GgmlConfig) -> dict[str, Type]:
    """Returns the type of each matrix by name.

    Raises:
        StrategyError: a width does not allow it.
    """
    decoder = describe_decoder(model.config)
    reason = problem(
        config.type,
        list(matrices.values()),
        decoder,
        importance=config.importance,
        falls_back=config.other_widths == "fallback",
    )
    if reason:
        raise StrategyError(reason)
    return {
        name: Type[fitting_type(matrix_type(config.type, matrix, decoder, importance=config.importance), matrix.width)]
        for name, matrix in matrices.items()
    }


def _fallbacks(
    model: PreTrainedModel, matrices: Mapping[str, Matrix], kinds: Mapping[str, Type], config: GgmlConfig
) -> int:
    """Returns the number of matrices that have another type than the rules say because of their width."""
    decoder = describe_decoder(model.config)
    return sum(
        kinds[name].name != matrix_type(config.type, matrix, decoder, importance=config.importance)
        for name, matrix in matrices.items()
    )


def _importance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Context, config: GgmlConfig
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the importance of each linear layer's inputs, and facts about the text; both empty without importance."""
    if not config.importance:
        return {}, {}
    texts = [example.input_ids for example in context.calibration(tokenizer, config.calibration_examples)]
    batches = pack_texts(texts, model.config, batch_tokens=_BATCH_TOKENS)
    return mean_squared_inputs(model, batches), {"calibration_tokens": sum(map(len, texts))}


@torch.no_grad()
def _quantise(
    model: PreTrainedModel, kinds: Mapping[str, Type], importance: Mapping[str, np.ndarray]
) -> tuple[dict[str, dict[str, torch.Tensor]], float]:
    """Replaces the matrices of `model` in place by what their blocks stand for.

    Returns:
        The blocks by layer, and Σ m (W − Q)² / Σ m W² over the decoder's linear layers, m the importance (else 1).
    """
    packed, lost, whole, inside = {}, 0.0, 0.0, linears(model)
    for name, kind in tqdm(kinds.items(), desc="quantise", unit="matrix"):
        parameter: Any = model.get_submodule(name).weight
        weight = parameter.detach().cpu().numpy()
        try:
            blocks = Blocks(quantise(weight, kind, importance.get(name), torch.get_num_threads()), kind)
        except StrategyError as error:
            raise StrategyError(f"{name}: {error}") from None
        rounded = blocks.weight()
        if name in inside:
            share = importance.get(name, np.ones(weight.shape[1], np.float32))
            lost += float(((weight - rounded) ** 2 @ share).sum())
            whole += float((weight**2 @ share).sum())
        parameter.copy_(torch.from_numpy(rounded))
        packed[name] = {PART: torch.from_numpy(blocks.data)}
    return packed, lost / whole if whole else 0.0


def _bytes(packed: Mapping[str, Mapping[str, torch.Tensor]]) -> int:
    return sum(tensor.nbytes for parts in packed.values() for tensor in parts.values())
