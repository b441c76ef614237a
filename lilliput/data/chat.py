"""A question and its answer as token ids under the model's own chat template."""

from __future__ import annotations

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
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str, *, end: bool = True) -> list[int]:
    """Ids of `answer`; with `end`, closed by the end-of-turn token, which a model must learn to write too."""
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if end else ids
