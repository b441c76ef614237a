"""Chat templates in the style of each family, written for these tests."""

from __future__ import annotations

from tests import families

_EACH = "{% for message in messages %}"


def _by_role(start: str, system: str, user: str, assistant: str, answer: str = "") -> str:
    """Returns a template with a form of its own for each role."""
    each = (
        f"{{% if message['role'] == 'system' %}}{system}{{% elif message['role'] == 'user' %}}{user}"
        f"{{% else %}}{assistant}{{% endif %}}"
    )
    return f"{start}{_EACH}{each}{{% endfor %}}{{% if add_generation_prompt %}}{answer}{{% endif %}}"


# The system prompt is inside the first user turn; each question begins with BOS and each answer ends with EOS.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n{{ system }}<|eot_id|>"
    "{% for message in turns %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GRANITE = (
    "{% if messages[0]['role'] != 'system' %}<|start_of_role|>system<|end_of_role|>Today's Date: "
    "{{ strftime_now('%B %d, %Y') }}.<|end_of_text|>\n{% endif %}" + _EACH + "<|start_of_role|>{{ message['role'] }}"
    "<|end_of_role|>{{ message['content'] }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
GEMMA = families.GEMMA.replace("<|im_start|>", "<start_of_turn>").replace(families.TURN_END, "<end_of_turn>")
PHI_3 = (
    _EACH + "<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
PHI_4 = (
    _EACH + "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
OLMO_2 = (
    "{{ bos_token }}" + _EACH + "<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
STABLE_LM = (
    _EACH + "<|{{ message['role'] }}|>\n{{ message['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
FALCON_3 = (
    _EACH + "<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The next turn's header ends an answer, as in GLM-4.
GLM_4 = (
    "[gMASK]<sop>" + _EACH + "<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
COHERE = _by_role(
    "{{ bos_token }}",
    "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{ message['content'] | trim }}<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{ message['content'] | trim }}<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{{ message['content'] | trim }}<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
)
# A system prompt of its own where the conversation has none, as in Qwen 2.5.
QWEN_2_5 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + families.CHATML
)
# Plain text without control tokens but EOS: these two families have no template of their own.
PLAIN = (
    _EACH + "{{ message['role'] }}: {{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
