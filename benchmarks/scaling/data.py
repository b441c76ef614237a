"""Rows of a question file: building a corpus of them, screening it, drawing training steps from it."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

from benchmarks.scaling.measuring import MIB, PROJECT, Counts, Row, real_tokenizer, tell, timed


def data(rows: Counts = None) -> None:
    """Builds a corpus of a question file, reads it as an evaluation does, and draws from it as a training does."""
    with tempfile.TemporaryDirectory() as folder:
        for count in rows or [1_000, 10_000, 100_000, 1_000_000]:
            source = Path(folder, f"{count}.jsonl")
            _write_own_questions(source, count)
            for step in (_build, _screen, _draw_steps):
                tell("data", {"rows": count, "source_mib": source.stat().st_size / MIB}, step, source)
            source.unlink()


def _write_own_questions(path: Path, count: int) -> None:
    """A file such as a user brings: four questions about each entity, with options; one in ten has no answer."""
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            row = {
                "id": f"number/{number}",
                "question": f"What is the register number of item {number:07d} in the inventory?",
                "group": f"item/{number // 4}",
            }
            known = {"answer": f"{number}", "choices": [f"{number + more}" for more in range(4)]}
            stream.write(json.dumps(row | (known if number % 10 else {"answerable": False})) + "\n")


def _build(source: Path) -> Row:
    from lilliput.data.corpus import write_corpus
    from lilliput.params import load_params
    from lilliput.recipes.build import build_corpus

    config = load_params(PROJECT / "params.yaml").data.model_copy(update={"source": str(source)})
    with timed() as cost:
        write_corpus(build_corpus(config, Path(), Path()), source.parent / "data")
    return cost


def _screen(source: Path) -> Row:
    from lilliput.contamination import find_contaminated
    from lilliput.data.corpus import read_corpus

    with timed() as cost:
        corpus = read_corpus(source.parent / "data")
        find_contaminated(corpus.train, corpus.questions)
    return cost


def _draw_steps(source: Path) -> Row:
    """The 640 examples of forty steps of sixteen, out of all that could have been drawn."""
    from lilliput.data.corpus import read_corpus
    from lilliput.params import load_params
    from lilliput.training.examples import collate, encode_examples
    from lilliput.training.loop import split_validation

    params, tokenizer = load_params(PROJECT / "params.yaml"), real_tokenizer()
    with timed() as cost:
        corpus = read_corpus(source.parent / "data")
        learnt, _ = split_validation(corpus.train, params.strategies.lora)
        examples = encode_examples(tokenizer, params.data.system_prompt, learnt)
        for place in random.Random(0).choices(range(len(examples)), k=640):
            collate([examples[place]], 0)
    return cost
