"""LoRA fine-tuning (Hu et al., arXiv 2106.09685) through peft, on the answer tokens alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.artifacts import ADAPTER
from lilliput.compress.result import Result
from lilliput.compress.training import encode_examples, label_loss, train
from lilliput.config import LoraConfig
from lilliput.data.chat import pad_id
from lilliput.data.questions import Question
from lilliput.models import Opened, save_model

_TARGETS = {"all-linear": "all-linear", "attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def lora(parent: Opened, questions: Sequence[Question], system_prompt: str, config: LoraConfig) -> Result:
    """`parent` fine-tuned on `questions` by LoRA or the variant named; merged, it has its old shape.

    Args:
        parent: float model and tokenizer; the model is changed in place.
        questions: training questions with their answers.
        system_prompt: the system line before each question.
        config: rank, schedule and seed.

    Returns:
        The merged model, or the parent with its adapter kept apart (`merge: false`), and the loss curve.
    """
    model, tokenizer = parent
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
    tuned = get_peft_model(model, adapter)
    examples = encode_examples(tokenizer, system_prompt, questions)
    curve = train(tuned, examples, pad_id(tokenizer), config, label_loss)
    facts = {"trainable_parameters": tuned.get_nb_trainable_parameters()[0], "final_loss": curve[-1][1]}
    if config.merge:
        return Result(_merged(tuned), tokenizer, facts, {"loss": curve})
    return Result(
        _merged(copy.deepcopy(tuned)),
        tokenizer,
        facts,
        {"loss": curve},
        save=lambda target: _save_apart(tuned, tokenizer, target),
    )


def _merged(tuned: PeftModel) -> PreTrainedModel:
    return cast("PreTrainedModel", tuned.merge_and_unload().eval())


def _save_apart(tuned: PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    tuned.save_pretrained(str(directory / ADAPTER), safe_serialization=True)
    save_model(cast("PreTrainedModel", tuned.unload()), tokenizer, directory)
