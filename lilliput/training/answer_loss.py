"""Hidden states, logits and loss on answer tokens alone; a beginning that all rows share is run once."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from lilliput.models import sharded, vocabulary_logits
from lilliput.statistics.perplexity import IGNORED
from lilliput.training.examples import Batch


def answer_logits(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits where the next token belongs to an answer, and that token.

    The vocabulary projection, a fifth of a small model's work, is run on answer positions alone, which does not change
    the result but for rounding.

    Args:
        model: a causal LM, possibly wrapped by peft.
        batch: as `collate` gives it.

    Returns:
        Float32 logits (answer tokens, vocabulary) and targets (answer tokens,).
    """
    states, targets = answer_states(model, batch)
    return answer_vocabulary(model, states[-1]), targets


def answer_vocabulary(model: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Float32 logits of the last of `answer_states`; exact sums need float32 where autocast computes in less."""
    return vocabulary_logits(causal_lm(model), hidden).float()


def answer_states(
    model: torch.nn.Module, batch: Batch, *, every_layer: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states where the next token belongs to an answer, and that token.

    What all rows begin with (system line, chat template) is run once and its keys and values are repeated for the rows,
    which gradients flow through: with short questions that is most of the tokens. Not under FSDP, which fetches a
    layer's weights for the backward pass when a gradient reaches what the layer returned, and here it comes by the
    cache: each row is then run whole.

    Args:
        model: a causal LM, possibly wrapped by peft.
        batch: as `collate` gives it.
        every_layer: give the input of each layer too, not only what the final norm puts out.

    Returns:
        Tensors (answer tokens, hidden size), the final norm's output last, and targets (answer tokens,).
    """
    base = causal_lm(model)
    ids, targets = batch["input_ids"], batch["labels"][:, 1:]
    wanted = targets != IGNORED
    shared = 0 if sharded() else _shared_beginning(ids, wanted)
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
    return [hidden[:, :-1][wanted[:, shared:]] for hidden in states], targets[wanted]


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The causal LM that peft may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore


def _shared_beginning(ids: torch.Tensor, wanted: torch.Tensor) -> int:
    """How many tokens all rows begin with, short of the first from which an answer is predicted."""
    same = (ids == ids[0]).all(dim=0).long().cumprod(0).sum()
    first = wanted.any(dim=0).long().argmax()
    return int(torch.minimum(same, first)) if len(ids) > 1 else 0


def label_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the answer tokens alone, a scalar in nats."""
    logits, targets = answer_logits(model, batch)
    return cross_entropy(logits, targets)
