"""Size of the model: random weights of larger shapes, fine-tuned, quantised, asked."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.scaling.measuring import PROJECT, Row, real_tokenizer, tell, timed

# Hidden size, layers, heads, key-value heads, neurons: of a rehearsal, SmolLM2-135M and -360M, and Llama 3.2 1B; the
# vocabulary is the default model's throughout.
SHAPES = {
    "tiny": (256, 8, 4, 2, 768),
    "135M": (576, 30, 9, 3, 1536),
    "360M": (960, 32, 15, 5, 2560),
    "1B": (2048, 16, 32, 8, 8192),
}
STEPS, CALIBRATION, ASKED = 2, 16, 16


def models(
    shape: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(SHAPES)} (repeatable)")] = None,
) -> None:
    """LoRA, GPTQ and choosing with models of random weights: what they cost does not hang on the weights."""
    for name in shape or list(SHAPES):
        with tempfile.TemporaryDirectory() as folder:
            for step in (_draw, _lora, _gptq, _choose):
                tell("models", {"model": name}, step, Path(folder), name)


def _draw(folder: Path, name: str) -> Row:
    from transformers import LlamaConfig

    from lilliput.models import random_model
    from lilliput.saving import save_model

    hidden, layers, heads, kv_heads, neurons = SHAPES[name]
    tokenizer = real_tokenizer()
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with timed() as cost:
        save_model(random_model(config, seed=0).bfloat16(), tokenizer, folder / "drawn")
    return cost | _size(folder)


def _lora(folder: Path, _name: str) -> Row:
    from lilliput.compress.context import Context
    from lilliput.compress.lora import lora
    from lilliput.data.corpus import Corpus

    params, questions = _params(), _questions()
    config = params.strategies.lora.model_copy(update={"steps": STEPS, "checkpoint_every": 0})
    context = Context(folder / "drawn", params.data.system_prompt, lambda: Corpus(questions, [], []))
    with timed() as cost:
        lora(context, config)
    return cost | _size(folder) | {"steps": STEPS}


def _gptq(folder: Path, _name: str) -> Row:
    from lilliput.compress.context import Context
    from lilliput.compress.gptq import gptq
    from lilliput.data.corpus import Corpus

    params, questions = _params(), _questions()
    config = params.strategies.gptq.model_copy(update={"calibration_examples": CALIBRATION})
    target = folder / "quantised"
    target.mkdir()
    corpus = Corpus([], questions, questions[:8])
    context = Context(folder / "drawn", params.data.system_prompt, lambda: corpus)
    with timed() as cost:
        result = gptq(context, config)
        assert result.save
        result.save(target)
    written = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    return cost | _size(folder) | {"calibration_examples": CALIBRATION, "quantised_mib": written / 2**20}


def _choose(folder: Path, _name: str) -> Row:
    from lilliput.evaluate.accuracy import score_choices
    from lilliput.models import open_model
    from lilliput.runtime.torch import TorchRuntime

    params = _params()
    asked = _questions()[:ASKED]
    opened, tokenizer = open_model(folder / "drawn")
    with timed() as cost:
        score_choices(TorchRuntime(opened, tokenizer, 16), tokenizer, params.data.system_prompt, asked)
    return cost | _size(folder) | {"questions": len(asked)}


def _params() -> Any:
    from lilliput.params import load_params

    return load_params(PROJECT / "params.yaml")


def _questions() -> list[Any]:
    from lilliput.data.questions import Question

    return [
        Question(
            id=f"item/{number}",
            question=f"Which shelf of the inventory holds item {number:05d}?",
            answer=f"Shelf {number % 7}",
            choices=(f"Shelf {number % 7}", *(f"Shelf {7 + more}" for more in range(3))),
            group=f"item/{number}",
        )
        for number in range(64)
    ]


def _size(folder: Path) -> Row:
    from lilliput.models import read_config
    from lilliput.shape import parameters

    return {"million_parameters": parameters(read_config(folder / "drawn")) / 1e6}
