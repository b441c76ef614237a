"""LoRA fine-tuning (Hu et al., arXiv 2106.09685) with peft, on the answer tokens only."""

from __future__ import annotations

import copy
import importlib.metadata
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.artifacts import ADAPTER
from lilliput.chat.template import pad_id
from lilliput.compress.context import Context
from lilliput.compress.new_tokens import trained_rows
from lilliput.compress.result import Result
from lilliput.config import LoraConfig
from lilliput.models import open_frozen, open_model, open_nf4, sharded
from lilliput.saving import save_model
from lilliput.stored_weights import widened
from lilliput.training.answer_loss import label_loss
from lilliput.training.loop import computes_in_bfloat16, train, training_examples, training_facts

_TARGETS = {"all-linear": "all-linear", "attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def lora(context: Context, config: LoraConfig) -> Result:
    """Fine-tunes the parent on the training questions with LoRA or one of its variants.

    QLoRA trains beside weights of four bits; its adapter is then added to the parent's float weights.

    Returns:
        The merged model in the parent's shape. With `merge: false`, `save` writes parent and adapter separately.
    """
    four_bits = config.variant == "qlora"
    parent = context.parent
    # An adapter that is stored separately is added to float32 weights, and FSDP shards weights of one dtype.
    open_parent = open_frozen if config.merge and not sharded() else open_model
    model, tokenizer = open_nf4(parent, computes_in_bfloat16(config)) if four_bits else open_parent(parent)
    tuned = with_adapter(model, config)
    training, validation = training_examples(
        tokenizer, context.system_prompt, context.corpus.train, config, context.turn_rules
    )
    history = train(tuned, training, pad_id(tokenizer), config, label_loss, validation, context.checkpoints)
    facts = {
        "trainable_parameters": tuned.get_nb_trainable_parameters()[0],
        **training_facts(history, config, training),
    }
    if four_bits:
        facts["bitsandbytes"] = importlib.metadata.version("bitsandbytes")
        tuned = _copy_adapter(tuned, with_adapter(open_parent(parent)[0], config))
    if config.merge:
        return Result(_merge(tuned), tokenizer, facts, history)
    return Result(
        _merge(copy.deepcopy(tuned)),
        tokenizer,
        facts,
        history,
        save=lambda target: _save_unmerged(tuned, tokenizer, target),
    )


def with_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Returns `model` with a new adapter, the only trainable part; its weights are drawn from `config.seed`.

    The adapter includes the rows of tokens that `load` added, which are replaced when it is merged.
    """
    torch.manual_seed(config.seed)
    adapter = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - peft takes a float too
        lora_dropout=config.dropout,
        target_modules=_TARGETS[config.target_modules],
        use_rslora=config.variant == "rslora",
        use_dora=config.variant == "dora",
        task_type="CAUSAL_LM",
        trainable_token_indices=trained_rows(model),
    )
    return cast("PeftModel", get_peft_model(model, adapter))


def _copy_adapter(source: PeftModel, target: PeftModel) -> PeftModel:
    """Gives `target` the adapter of `source` and returns it."""
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    return target


def _merge(tuned: PeftModel) -> PreTrainedModel:
    """Adds the adapter to the weights, layer by layer in float32."""
    for layer in tuned.modules():
        if isinstance(layer, BaseTunerLayer):
            with widened([layer.get_base_layer()]):
                layer.merge()
    return cast("PreTrainedModel", tuned.unload().eval())


def _save_unmerged(tuned: PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    for adapter in tuned.peft_config.values():  # a set by peft, whose order depends on Python's hash seed
        adapter.target_modules = sorted(adapter.target_modules)  # pyright: ignore[reportAttributeAccessIssue]
    tuned.save_pretrained(str(directory / ADAPTER), safe_serialization=True)
    save_model(cast("PreTrainedModel", tuned.unload()), tokenizer, directory)
