"""LoRA fine-tuning (Hu et al., arXiv 2106.09685) through peft, on the answer tokens alone."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.artifacts import ADAPTER
from lilliput.chat.template import pad_id
from lilliput.compress.result import Result
from lilliput.config import LoraConfig
from lilliput.data.questions import Question
from lilliput.models import open_model, open_nf4, save_model
from lilliput.training.answer_loss import label_loss
from lilliput.training.examples import lazy_examples
from lilliput.training.loop import computes_in_bfloat16, outcome, set_aside, train

_TARGETS = {"all-linear": "all-linear", "attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def lora(
    parent: Path,
    questions: Sequence[Question],
    system_prompt: str,
    config: LoraConfig,
    checkpoints: Path | None = None,
) -> Result:
    """The model in `parent` fine-tuned on `questions` by LoRA or the variant named; merged, it has its old shape.

    QLoRA trains beside weights of four bits, and its adapter is then added to the float weights: those are what the
    descendants are made from.

    Args:
        parent: folder of a float checkpoint.
        questions: training questions with their answers.
        system_prompt: the system line before each question.
        config: rank, schedule and seed.
        checkpoints: where a killed training goes on from (see `train`).

    Returns:
        The merged model, or the parent with its adapter kept apart (`merge: false`), and the loss curves.
    """
    four_bits = config.variant == "qlora"
    model, tokenizer = open_nf4(parent, computes_in_bfloat16(config)) if four_bits else open_model(parent)
    tuned = with_adapter(model, config)
    learnt, validated = (lazy_examples(tokenizer, system_prompt, part) for part in set_aside(questions, config))
    history = train(tuned, learnt, pad_id(tokenizer), config, label_loss, validated, checkpoints)
    facts = {"trainable_parameters": tuned.get_nb_trainable_parameters()[0], **outcome(history, config)}
    if four_bits:
        facts["bitsandbytes"] = importlib.metadata.version("bitsandbytes")
        tuned = _moved(tuned, with_adapter(open_model(parent)[0], config))
    if config.merge:
        return Result(_merged(tuned), tokenizer, facts, dict(history))
    return Result(
        _merged(copy.deepcopy(tuned)),
        tokenizer,
        facts,
        dict(history),
        save=lambda target: _save_apart(tuned, tokenizer, target),
    )


def with_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`model` with a fresh adapter, which alone is trained; its weights are drawn from `config.seed`."""
    torch.manual_seed(config.seed)
    adapter = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - peft takes a float too
        lora_dropout=config.dropout,
        target_modules=_TARGETS[config.target_modules],
        use_rslora=config.variant == "rslora",
        use_dora=config.variant == "dora",
        task_type="CAUSAL_LM",
    )
    return cast("PeftModel", get_peft_model(model, adapter))


def _moved(source: PeftModel, target: PeftModel) -> PeftModel:
    """`target` with the adapter of `source`."""
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    return target


def _merged(tuned: PeftModel) -> PreTrainedModel:
    return cast("PreTrainedModel", tuned.merge_and_unload().eval())


def _save_apart(tuned: PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    tuned.save_pretrained(str(directory / ADAPTER), safe_serialization=True)
    save_model(cast("PreTrainedModel", tuned.unload()), tokenizer, directory)
