"""Control tokens that a chosen chat template needs and a base model lacks: ids, rows in the tables, and their training.

`config.json` keeps their ids (`added_token_ids`), so that LoRA trains these rows beside the adapter.
"""

from __future__ import annotations

import copy
import re
from typing import Any, cast

import torch
from tokenizers import AddedToken
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lilliput.chat_templates.built_in import built_in_templates

_CONTROL = re.compile(r"<\|[\w.-]+\|>")
_WITH_BOS = "{{- bos_token -}}"


def adopt_template(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Gives `tokenizer` the chosen chat template and the tokens `<|…|>` in it that are new; returns their ids.

    The ids follow the last one of the vocabulary, so a padded embedding table has rows for them already. A built-in
    template begins with BOS if the tokenizer puts BOS before a text, because the model saw no text without it.
    """
    built_in = template.strip() in built_in_templates()
    tokenizer.chat_template = _WITH_BOS + template if built_in and _puts_bos(tokenizer) else template
    vocabulary = tokenizer.get_vocab()
    new = [text for text in dict.fromkeys(_CONTROL.findall(template)) if text not in vocabulary]
    added = [AddedToken(text, special=True, normalized=False) for text in new]
    tokenizer.add_tokens(added, special_tokens=True)  # pyright: ignore[reportArgumentType]
    return [cast("int", tokenizer.convert_tokens_to_ids(text)) for text in new]


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    first = cast("list[int]", tokenizer("a")["input_ids"])[:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def with_rows_for(config: PretrainedConfig, ids: list[int]) -> PretrainedConfig:
    """Returns a copy of `config` whose embedding table has a row for each of `ids`."""
    grown: Any = copy.deepcopy(config)
    text = grown.get_text_config()
    text.vocab_size = max([text.vocab_size, *(token + 1 for token in ids)])
    return grown


@torch.no_grad()
def add_rows(model: PreTrainedModel, ids: list[int]) -> None:
    """Adds rows for `ids` to the tables of `model`, in place: the mean of the rows of all older tokens.

    With the mean, a new token gets about the average logit and takes little probability from the others (Hewitt,
    "Initializing New Word Embeddings for Pretrained Language Models", 2021).
    """
    if not ids:
        return
    tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    means = [_means(table, min(ids)) for table in tables]
    if max(ids) >= tables[0].weight.shape[0]:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    for table, mean in zip((model.get_input_embeddings(), model.get_output_embeddings()), means, strict=True):
        for name, value in mean.items():
            getattr(table, name)[ids] = value
    model.config.added_token_ids = ids


def _means(table: Any, rows: int) -> dict[str, torch.Tensor]:
    """Returns the mean of the first `rows` rows of each parameter of an embedding or an output layer."""
    return {name: value[:rows].mean(0) for name, value in table.named_parameters()}


def trained_rows(model: PreTrainedModel) -> dict[str, list[int]] | None:
    """Returns the rows that LoRA must train by name of their table, in the form of peft; None if no token is new."""
    ids = getattr(model.config, "added_token_ids", None)
    if not ids:
        return None
    tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    distinct = tables if tables[1] is not None and tables[1].weight is not tables[0].weight else tables[:1]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(table)].rpartition(".")[2]: list(ids) for table in distinct}
