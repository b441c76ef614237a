"""Writes a bundle: one folder with the compiled model and what stock software needs to run it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from lilliput.artifacts import LICENCE, Manifest, copy_licence, seal, write_json, write_text
from lilliput.chat.template import (
    PINNED_DATE,
    conversation,
    date_can_be_inserted_later,
    end_ids,
    missing_in_template,
    read_generation_config,
    render,
    uses_date,
)
from lilliput.compile.tokenizer_files import TOKENIZER_FILES

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
_FUNCTIONS = (
    "6. Functions: llama.cpp's server writes the `tools` of a chat request into the prompt, with the chat template in "
    "model.gguf. A call is text in the answer, in the form of that template.\n"
)
_DATE_NOTES = {
    "none": "",
    "today": "; `{{date:FORMAT}}` in it is today in that strftime format",
    "pinned": f"; the date in it is that of evaluation, {PINNED_DATE:%Y-%m-%d}: the chat template computes with dates",
}


@dataclass(frozen=True)
class BundleSettings:
    """Settings of a bundle: the device, and the prompt and limits used in evaluation.

    Attributes:
        device: name of the device.
        threads: CPU threads of the device.
        context_tokens: maximum tokens of prompt and answer together.
        system_prompt: the system prompt of training and evaluation.
        max_new_tokens: maximum tokens of an answer.
        licence: licence of the source model; None if params.yaml names none.
    """

    device: str
    threads: int
    context_tokens: int
    system_prompt: str
    max_new_tokens: int
    licence: str | None


def write_bundle(
    folder: Path, compiled: Path, checkpoint: Path, manifest: Manifest, settings: BundleSettings
) -> Manifest:
    """Writes model, tokenizer, prompt, sampling defaults and start instructions to `folder`, and seals it.

    Args:
        folder: an empty folder.
        compiled: folder of the verified compiled model.
        checkpoint: the checkpoint that was compiled.
        manifest: manifest of the compiled model.
        settings: device, prompt and limits.

    Returns:
        The manifest of the bundle.
    """
    for path in sorted(compiled.iterdir()):
        if path.name in manifest.files:
            shutil.copyfile(path, folder / path.name)
    copy_licence(compiled, folder)
    for pattern in TOKENIZER_FILES:
        for path in checkpoint.glob(pattern):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    template, date = prompt_template(tokenizer, settings.system_prompt), _prompt_date(tokenizer)
    sampling = {"temperature": 0.0, "max_new_tokens": settings.max_new_tokens}
    write_json(folder / "prompt.json", {"system": settings.system_prompt, "template": template, "sampling": sampling})
    target = manifest.strategy
    if target == "gguf" and date != "today":
        ends = end_ids(tokenizer, read_generation_config(checkpoint))
        write_text(folder / "Modelfile", _modelfile(template, tokenizer.convert_ids_to_tokens(ends), settings))
    functions = target == "gguf" and missing_in_template(tokenizer) is None
    texts = sorted(path.name for path in (folder / LICENCE).glob("*"))
    write_text(folder / "README.md", _readme(manifest, settings, date, functions, texts))
    return seal(
        folder,
        candidate=manifest.candidate,
        strategy="bundle",
        config={
            "device": settings.device,
            "target": target,
            "context_tokens": settings.context_tokens,
            "threads": settings.threads,
        },
        parent=manifest,
        parameters=manifest.parameters,
        facts={"licence": settings.licence, "candidate": manifest.config["candidate"]},
    )


def prompt_template(tokenizer: Any, system_prompt: str) -> str:
    """Returns the model's whole prompt, special tokens included, with `{{system}}` and `{{question}}` in it.

    Without a system prompt there is no system turn, as in training.

    Today's date becomes `{{date:FORMAT}}` (strftime), because a bundle is used on a later day. If the template computes
    with the date, the date of evaluation is inserted instead.
    """
    date = PINNED_DATE if _prompt_date(tokenizer) == "pinned" else None
    turns = conversation("{{system}}", "{{question}}")
    return render(tokenizer, turns if system_prompt else turns[1:], date=date)


def _prompt_date(tokenizer: Any) -> Literal["none", "today", "pinned"]:
    """Returns how the prompt handles the date: not at all, as a placeholder, or pinned."""
    if not uses_date(tokenizer):
        return "none"
    return "today" if date_can_be_inserted_later(tokenizer) else "pinned"


def _modelfile(template: str, stops: Sequence[str], settings: BundleSettings) -> str:
    ollama = template.replace("{{system}}", "{{ .System }}").replace("{{question}}", "{{ .Prompt }}")
    parameters = [("temperature", 0), ("num_ctx", settings.context_tokens), ("num_predict", settings.max_new_tokens)]
    parameters += [("stop", f'"{stop}"') for stop in stops]
    system = settings.system_prompt
    # The line break separates a final quotation mark from the closing ones; a single line needs no quotation marks.
    quoted = f'"""{system}\n"""' if "\n" in system or system.startswith('"') else system
    lines = ["FROM ./model.gguf", f'TEMPLATE """{ollama}"""', f"SYSTEM {quoted}"]
    return "\n".join([*lines, *(f"PARAMETER {key} {value}" for key, value in parameters)]) + "\n"


def _readme(
    manifest: Manifest,
    settings: BundleSettings,
    date: Literal["none", "today", "pinned"],
    functions: bool,
    licence_texts: Sequence[str],
) -> str:
    target = manifest.strategy
    needs = (_NEEDS[target] + (_OLLAMA[date == "today"] if target == "gguf" else "")).format(
        name=manifest.config["candidate"]
    )
    start = _START[target].replace("CONTEXT", str(settings.context_tokens)).replace("THREADS", str(settings.threads))
    licence = settings.licence or "not named in params.yaml (source.licence); see its publisher"
    if licence_texts:
        licence += f"; its text is in {LICENCE}/ ({', '.join(licence_texts)}) and must accompany every copy"
    return (
        f"# {manifest.candidate} for {settings.device}\n\n"
        f"1. Needs: {needs}.\n"
        f"2. Start: `{start}`\n"
        f"3. Ask with this system line: {json.dumps(settings.system_prompt, ensure_ascii=False)}; "
        "prompt.json has the whole prompt with its special tokens, so tokenise it without adding any"
        f"{_DATE_NOTES[date]}.\n"
        f"4. Answers were measured greedy, with up to {settings.max_new_tokens} new tokens; "
        "parity.json says how near it is to its checkpoint.\n"
        f"5. Licence of the model: {licence}. "
        "lilliput.json has the sha256 of every file.\n" + (_FUNCTIONS if functions else "")
    )
