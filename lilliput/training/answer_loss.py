"""Hidden states, logits and loss on the answer tokens only; the common prefix of a batch is run once."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from lilliput.models import sharded, vocabulary_logits
from lilliput.statistics.perplexity import IGNORED
from lilliput.training.examples import Batch


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

    The common prefix of all rows (system prompt, chat template) runs once; its keys and values are repeated for the
    rows, with gradients. With short questions this is most of the tokens. Under FSDP each row runs whole: FSDP fetches
    the weights of a layer for the backward pass when a gradient reaches the layer's output, but here it arrives through
    the cache.

    Args:
        model: a causal LM, possibly wrapped by peft.
        batch: from `collate`.
        every_layer: also return the input of each layer, not only the output of the final norm.

    Returns:
        Tensors (answer tokens, hidden size), the output of the final norm last; and targets (answer tokens,).
    """
    base = causal_lm(model)
    ids, targets = batch["input_ids"], batch["labels"][:, 1:]
    is_answer = targets != IGNORED
    shared = 0 if sharded() else _common_prefix(ids, is_answer)
    cache = DynamicCache(config=base.config)
    if shared:
        base.model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(ids))
    output = base.model(
        input_ids=ids[:, shared:],
        attention_mask=batch["attention_mask"],
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=every_layer,
    )
    states = output.hidden_states if every_layer else [output.last_hidden_state]
    return [hidden[:, :-1][is_answer[:, shared:]] for hidden in states], targets[is_answer]


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """Returns the causal LM inside `model`, which peft may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore


def _common_prefix(ids: torch.Tensor, is_answer: torch.Tensor) -> int:
    """Returns the length of the common prefix of all rows, before the first position that predicts an answer."""
    same = (ids == ids[0]).all(dim=0).long().cumprod(0).sum()
    first = is_answer.any(dim=0).long().argmax()
    return int(torch.minimum(same, first)) if len(ids) > 1 else 0


def label_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Returns the mean cross-entropy over the answer tokens, a scalar in nats."""
    logits, targets = answer_logits(model, batch)
    return cross_entropy(logits, targets)
