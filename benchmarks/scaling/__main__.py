"""What grows with the work, and how: one sub-command a dimension; docs/scaling.md shows what came out.

python -m benchmarks.scaling data        # rows of a question file
python -m benchmarks.scaling candidates  # candidates of the graph
python -m benchmarks.scaling registry    # model versions
python -m benchmarks.scaling questions   # questions that two candidates were asked
python -m benchmarks.scaling answers     # questions asked of one candidate
python -m benchmarks.scaling models      # size of the model
python -m benchmarks.scaling workers     # workers of a runner
python -m benchmarks.scaling chart       # docs/scaling.svg out of all of them

Each writes benchmarks/results/scaling-<dimension>.json. Every measurement has a process of its own, whose peak memory
it reports; times are CPU-seconds of that process and its children, which a busy machine disturbs less than the clock.
"""

from __future__ import annotations

import typer

from benchmarks.scaling.answers import answers
from benchmarks.scaling.candidates import candidates
from benchmarks.scaling.chart import chart
from benchmarks.scaling.data import data
from benchmarks.scaling.models import models
from benchmarks.scaling.questions import questions
from benchmarks.scaling.registry import registry
from benchmarks.scaling.workers import workers

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for dimension in (data, candidates, registry, questions, answers, models, workers, chart):
    app.command()(dimension)

if __name__ == "__main__":
    app()
