"""Variants of the tiny model: chat templates and special tokens of other model families, with the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Tokens of SmolLM2's vocabulary that llama.cpp does not recognise by name as end tokens.
BOS, TURN_END, OTHER_END = "<jupyter_start>", "<issue_closed>", "<jupyter_code>"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ends turns with a token of its own, as Llama 3 does.
OWN_END = CHATML.replace("<|im_end|>", TURN_END)
# Begins with BOS and rejects the system role, as Gemma does.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<|im_start|>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    f"{{{{ message['content'] | trim }}}}{TURN_END}\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# Silently drops the system prompt.
DROPS_SYSTEM = CHATML.replace(
    "%}<|im_start|>", "%}{% if message['role'] == 'system' %}{% continue %}{% endif %}<|im_start|>", 1
)
# Shows the system prompt before a question, but only if no answer follows, as Mistral does.
BEFORE_LAST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}<|im_start|>{{ message['role'] }}\n"
    "{{ (system if loop.last and message['role'] == 'user' else '') + message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Inserts today's date, as Granite (by function) and Llama 3.1 (by variable) do.
DATED = "<|im_start|>system\nToday's Date: {{ strftime_now('%B %d, %Y') }}.<|im_end|>\n" + CHATML
DATED_BY_VARIABLE = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|>system\nToday Date: {{ date_string }}<|im_end|>\n" + CHATML
)


def make_source(
    checkpoint: Path,
    folder: Path,
    template: str | None,
    edit: Callable[[Any], None] = lambda tokenizer: None,
    generation: dict[str, Any] | None = None,
) -> Path:
    """Copies the tiny model to `folder` with another chat template.

    Args:
        checkpoint: the tiny model.
        folder: a new folder.
        template: the chat template; None for none.
        edit: changes the tokenizer in place.
        generation: keys of generation_config.json.
    """
    from transformers import AutoTokenizer

    shutil.copytree(checkpoint, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.chat_template = template
    edit(tokenizer)
    tokenizer.save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (generation or {})))
    return folder
