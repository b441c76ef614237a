"""Questions asked of one candidate: what it takes to answer them, by choice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.scaling.measuring import Counts, Row, tell, timed

BATCH = 16
Model = Annotated[Path, typer.Option(help="a checkpoint")]


def answers(count: Counts = None, model: Model = Path("models/base")) -> None:
    """Chooses among four options of each question with a real model."""
    for number in count or [100, 400, 1_600]:
        tell("answers", {"questions": number}, _choose, model, number)


def _choose(model: Path, count: int) -> Row:
    from lilliput.data.questions import Question
    from lilliput.evaluate.accuracy import score_choices
    from lilliput.models import open_model
    from lilliput.runtime.torch import TorchRuntime

    drawn = random.Random(count)
    questions = [
        Question(
            id=f"number/{number}",
            question=f"What is the register number of item {drawn.randrange(10**6):06d} in the inventory?",
            answer=str(number),
            choices=tuple(str(number + more) for more in range(4)),
            group=f"item/{number}",
        )
        for number in range(count)
    ]
    opened, tokenizer = open_model(model)
    runtime = TorchRuntime(opened, tokenizer, BATCH)
    with timed() as cost:
        score_choices(runtime, tokenizer, "Answer with the fact alone.", questions)
    return cost | {"cpu_ms_a_question": 1e3 * cost["cpu_s"] / count}
