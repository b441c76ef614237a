"""A question and its answer as token ids under the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import cast

from transformers import PreTrainedTokenizerBase

from lilliput.errors import DataError


def encode_prompt(tokenizer: PreTrainedTokenizerBase, system_prompt: str, question: str) -> list[int]:
    """Ids of the system line and `question`, up to where the assistant's answer begins.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, so a question cannot be put to the model; "
            "use an instruction-tuned model or add `chat_template` to its tokenizer_config.json"
        )
    messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return _ids(tokenizer, str(text))


def encode_beginning(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> list[int]:
    """The ids that prompts begin with whatever is asked: system line and chat template."""
    # Two questions with nothing in common; a runtime compares with each prompt before it relies on this.
    prompts = [encode_prompt(tokenizer, system_prompt, text) for text in ("Why?", "9")]
    return prompts[0][: shared_beginning(prompts)]


def shared_beginning(sequences: Sequence[Sequence[int]]) -> int:
    """How many ids all `sequences` begin with."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str, *, end: bool = True) -> list[int]:
    """Ids of `answer`; with `end`, closed by the end-of-turn token, which a model must learn to write too."""
    ids = _ids(tokenizer, answer)
    return [*ids, end_id(tokenizer)] if end else ids


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a turn."""
    return cast("int", tokenizer.eos_token_id)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up a batch; masked wherever it stands, so any will do where the tokenizer names none."""
    return cast("int", tokenizer.pad_token_id or tokenizer.eos_token_id or 0)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"])
