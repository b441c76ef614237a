"""Hidden states, logits and loss on the answer tokens only; common beginnings of a batch run once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from lilliput.decoders import attention_reach, vocabulary_logits
from lilliput.models import sharded
from lilliput.statistics.perplexity import IGNORED
from lilliput.training.examples import Batch
from lilliput.training.token_tree import token_tree


def answer_logits(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits at the positions before answer tokens, and these tokens as targets.

    The vocabulary projection, a fifth of a small model's work, runs on these positions only; the result is the same up
    to rounding.

    Args:
        model: a causal LM, possibly wrapped by peft.
        batch: from `collate`.

    Returns:
        Float32 logits (answer tokens, vocabulary) and targets (answer tokens,).
    """
    states, targets = answer_states(model, batch)
    return answer_vocabulary(model, states[-1]), targets


def answer_vocabulary(model: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Returns float32 logits of the last of `answer_states`; under autocast, sums would lose precision."""
    return vocabulary_logits(causal_lm(model), hidden).float()


def answer_states(
    model: torch.nn.Module, batch: Batch, *, every_layer: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns the hidden states at the positions before answer tokens, and these tokens as targets.

    Tokens that texts of the batch have in common at their beginning run once, with gradients (`token_tree`). With short
    questions this is most of the tokens. With dropout, their values are dropped in common. If `runs_as_tree` is false,
    texts are padded to the longest, and share only the prefix common to all, if every layer is attention.

    Args:
        model: a causal LM, possibly wrapped by peft.
        batch: from `collate`.
        every_layer: also return the input of each layer, not only the output of the final norm.

    Returns:
        Tensors (answer tokens, hidden size), the output of the final norm last; and targets (answer tokens,).
    """
    targets = batch["labels"][:, 1:]
    is_answer = targets != IGNORED
    run = _states_of_tree if runs_as_tree(causal_lm(model), batch["input_ids"].shape[1]) else _states_of_rows
    return run(causal_lm(model), batch, is_answer, every_layer), targets[is_answer]


def runs_as_tree(model: PreTrainedModel, longest: int) -> bool:
    """Returns whether texts of up to `longest` tokens may run as a tree.

    Each layer must see the whole text, and its attention must accept any mask.
    """
    return _reach(model) > longest and model.config._attn_implementation in ("sdpa", "eager")


def _reach(model: PreTrainedModel) -> float:
    """Returns `attention_reach`, or 0 if the positions are not rotary."""
    return attention_reach(model.config) if hasattr(model.model, "rotary_emb") else 0


def _states_of_tree(
    model: PreTrainedModel, batch: Batch, is_answer: torch.Tensor, every_layer: bool
) -> list[torch.Tensor]:
    ids, device = batch["input_ids"], batch["input_ids"].device
    shared = _common_prefix(ids, is_answer)
    lengths = batch["attention_mask"].sum(1).tolist()
    # The last token of a text predicts nothing.
    tree = token_tree([row[: length - 1] for row, length in zip(ids.tolist(), lengths, strict=True)], shared)
    rows = [row[shared:].nonzero()[:, 0].tolist() for row in is_answer.cpu()]
    wanted = torch.tensor([places[i] for places, row in zip(tree.places, rows, strict=True) for i in row])
    eager = model.config._attn_implementation == "eager"
    output = model.model(
        input_ids=tree.ids.to(device),
        attention_mask=(_as_bias(tree.mask) if eager else tree.mask).to(device),
        position_ids=tree.positions.to(device),
        past_key_values=_prefix_cache(model, ids[:1, :shared], len(tree.ids)),
        use_cache=shared > 0,
        output_hidden_states=every_layer,
    )
    return [hidden.flatten(0, 1)[wanted.to(device)] for hidden in _states(output, every_layer)]


def _states_of_rows(
    model: PreTrainedModel, batch: Batch, is_answer: torch.Tensor, every_layer: bool
) -> list[torch.Tensor]:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shared = _common_prefix(ids, is_answer) if _reach(model) else 0
    output = model.model(
        input_ids=ids[:, shared:-1],  # the last tokens predict nothing
        attention_mask=mask[:, :-1],
        past_key_values=_prefix_cache(model, ids[:1, :shared], len(ids)),
        use_cache=shared > 0,
        output_hidden_states=every_layer,
    )
    return [hidden[is_answer[:, shared:]] for hidden in _states(output, every_layer)]


def _as_bias(mask: torch.Tensor) -> torch.Tensor:
    """Returns the mask that eager attention adds to its scores, in float32 as all models compute."""
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)


def _states(output: Any, every_layer: bool) -> Sequence[torch.Tensor]:
    return output.hidden_states if every_layer else [output.last_hidden_state]


def _prefix_cache(model: PreTrainedModel, prefix: torch.Tensor, rows: int) -> DynamicCache | None:
    """Returns keys and values of `prefix`, (1, tokens), repeated for `rows`, with gradients; None without a prefix."""
    if not prefix.numel():
        return None
    cache = DynamicCache(config=model.config)
    model.model(input_ids=prefix, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(rows)
    return cache


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """Returns the causal LM inside `model`, which peft may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore


def _common_prefix(ids: torch.Tensor, is_answer: torch.Tensor) -> int:
    """Returns the length of the common prefix of all rows, before the first position that predicts an answer.

    It is 0 under FSDP, which fetches the weights of a layer for the backward pass when a gradient reaches the layer's
    output; the gradient of a prefix arrives through the cache.
    """
    if len(ids) == 1 or sharded():
        return 0
    same = (ids == ids[0]).all(dim=0).long().cumprod(0).sum()
    first = is_answer.any(dim=0).long().argmax()
    return int(torch.minimum(same, first))


def label_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Returns the mean cross-entropy over the answer tokens, a scalar in nats."""
    logits, targets = answer_logits(model, batch)
    return cross_entropy(logits, targets)
