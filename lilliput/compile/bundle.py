"""What a device is given: the compiled model and all it takes to run it with stock software, in one folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from lilliput.artifacts import TOKENIZER_FILES, Manifest, seal, write_json, write_text
from lilliput.chat.template import (
    PINNED_DATE,
    conversation,
    date_can_follow,
    end_ids,
    read_generation_config,
    render,
    uses_date,
)

_START = {
    "gguf": "llama-server -m model.gguf --jinja -c CONTEXT -t THREADS --temp 0",
    "onnx": (
        "python -c \"import onnxruntime_genai as og, json, re, time; m = og.Model('.'); t = og.Tokenizer(m); "
        "p = json.load(open('prompt.json')); g = og.Generator(m, og.GeneratorParams(m)); "
        "d = re.sub('{{date:(.*?)}}', lambda f: time.strftime(f[1]), p['template']); "
        "g.append_tokens(t.encode(d.replace('{{system}}', p['system']).replace('{{question}}', input()))); "
        "exec('while not g.is_done(): g.generate_next_token()'); print(t.decode(g.get_sequence(0)))\""
    ),
}
_NEEDS = {
    "gguf": "llama.cpp (https://github.com/ggml-org/llama.cpp)",
    "onnx": "`pip install onnxruntime-genai`",
}
_OLLAMA = {
    False: "; for Ollama: `ollama create {name} -f Modelfile`",
    True: "; not for Ollama, whose templates cannot format today's date as this model's chat template does",
}
_DATED = {
    "none": "",
    "today": "; `{{date:FORMAT}}` in it is today in that strftime format",
    "pinned": f"; the date in it is that of evaluation, {PINNED_DATE:%Y-%m-%d}: the chat template computes with dates",
}


@dataclass(frozen=True)
class Use:
    """How a model is to be asked.

    Attributes:
        device: its name.
        threads: CPU threads there.
        context_tokens: of prompt and answer together.
        system_prompt: the system line it was tuned and measured with.
        max_new_tokens: of an answer.
        licence: of the source model; None where nobody has named it.
    """

    device: str
    threads: int
    context_tokens: int
    system_prompt: str
    max_new_tokens: int
    licence: str | None


def write_bundle(folder: Path, compiled: Path, checkpoint: Path, manifest: Manifest, use: Use) -> Manifest:
    """Fills `folder` with model, tokenizer, prompt, sampling defaults, how to start it, and a manifest of sha256 sums.

    Args:
        folder: an empty folder.
        compiled: the compiled model, verified.
        checkpoint: what it was compiled from.
        manifest: of the compiled model.
        use: how it is to be asked.
    """
    for path in sorted(compiled.iterdir()):
        if path.name in manifest.files:
            shutil.copyfile(path, folder / path.name)
    for pattern in TOKENIZER_FILES:
        for path in checkpoint.glob(pattern):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    template, dated = chat_template(tokenizer), _date(tokenizer)
    sampling = {"temperature": 0.0, "max_new_tokens": use.max_new_tokens}
    write_json(folder / "prompt.json", {"system": use.system_prompt, "template": template, "sampling": sampling})
    target = manifest.strategy
    if target == "gguf" and dated != "today":
        ends = end_ids(tokenizer, read_generation_config(checkpoint))
        write_text(folder / "Modelfile", _modelfile(template, tokenizer.convert_ids_to_tokens(ends), use))
    write_text(folder / "README.md", _readme(manifest, use, dated))
    return seal(
        folder,
        candidate=manifest.candidate,
        strategy="bundle",
        config={"device": use.device, "target": target, "context_tokens": use.context_tokens, "threads": use.threads},
        parent=manifest,
        parameters=manifest.parameters,
        facts={"licence": use.licence, "candidate": manifest.config["candidate"]},
    )


def chat_template(tokenizer: Any) -> str:
    """The text of the model's whole prompt, special tokens included, with `{{system}}` and `{{question}}` in it.

    Where the chat template inserts today's date there is `{{date:FORMAT}}`, FORMAT being one of strftime: the bundle is
    used on another day than it was made. A template that computes with the date gets the date of evaluation.
    """
    date = PINNED_DATE if _date(tokenizer) == "pinned" else None
    return render(tokenizer, conversation("{{system}}", "{{question}}"), date=date)


def _date(tokenizer: Any) -> Literal["none", "today", "pinned"]:
    """The date in the prompt of a bundle."""
    if not uses_date(tokenizer):
        return "none"
    return "today" if date_can_follow(tokenizer) else "pinned"


def _modelfile(template: str, stops: Sequence[str], use: Use) -> str:
    ollama = template.replace("{{system}}", "{{ .System }}").replace("{{question}}", "{{ .Prompt }}")
    settings = [("temperature", 0), ("num_ctx", use.context_tokens), ("num_predict", use.max_new_tokens)]
    settings += [("stop", f'"{stop}"') for stop in stops]
    system = use.system_prompt
    # Three quotation marks would run into one that ends the text; what is one line needs none.
    told = f'"""{system}\n"""' if "\n" in system or system.startswith('"') else system
    lines = ["FROM ./model.gguf", f'TEMPLATE """{ollama}"""', f"SYSTEM {told}"]
    return "\n".join([*lines, *(f"PARAMETER {key} {value}" for key, value in settings)]) + "\n"


def _readme(manifest: Manifest, use: Use, dated: Literal["none", "today", "pinned"]) -> str:
    target = manifest.strategy
    needs = (_NEEDS[target] + (_OLLAMA[dated == "today"] if target == "gguf" else "")).format(
        name=manifest.config["candidate"]
    )
    start = _START[target].replace("CONTEXT", str(use.context_tokens)).replace("THREADS", str(use.threads))
    return (
        f"# {manifest.candidate} for {use.device}\n\n"
        f"1. Needs: {needs}.\n"
        f"2. Start: `{start}`\n"
        f"3. Ask with this system line: {json.dumps(use.system_prompt, ensure_ascii=False)}; "
        "prompt.json has the whole prompt with its special tokens, so tokenise it without adding any"
        f"{_DATED[dated]}.\n"
        f"4. Answers were measured greedy, with up to {use.max_new_tokens} new tokens; "
        "parity.json says how near it is to its checkpoint.\n"
        f"5. Licence of the model: {use.licence or 'not named in params.yaml (source.licence); see its publisher'}. "
        "lilliput.json has the sha256 of every file.\n"
    )
