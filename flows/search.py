"""Searches for the best sequence of strategies from one base, within a budget."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.engine.console import front_rows, print_search
from flows.engine.folders import portable, settings_file
from flows.engine.launch import launch
from flows.engine.output import guarded_output
from flows.engine.process import run_process
from flows.engine.run_context import show_table
from flows.engine.runners import RUNNER_HELP, WORKERS_HELP, open_runner, require_runner, runner_kind
from flows.engine.stage import Stage
from flows.engine.stopping import rejected_input
from flows.engine.waiting import retry_while_busy, wait_for_folder
from flows.engine.workspace import PROJECT, open_workspace
from lilliput.artifacts import read_record, write_json, write_text
from lilliput.config import read_section
from lilliput.errors import ConfigError
from lilliput.params import load_params
from lilliput.public_benchmarks.run import require_benchmarks
from lilliput.records import EvaluationRecord, Promotions, SearchRecord, TrialRecord
from lilliput.search import SearchConfig, Space, describe, winners
from tasks import layout

if TYPE_CHECKING:  # bring DVC and Optuna
    from optuna import Study

    from flows.chains.chain_runner import ChainRunner
    from flows.chains.study import Budget

SPACE = "examples/search.yaml"
RUN_NAME = "search-{params_file}"
LOG = Stage("search", "python -m tasks search", "log the search to MLflow")


def search(
    params_file: str = "params.yaml",
    search_file: str = SPACE,
    trials: int = 20,
    minutes: float = 120.0,
    share_machine: bool = False,
    runner: str = "local",
    workers: int = 1,
) -> str:
    """Tries chains of strategies in its own workspace and writes the results; returns why it stopped.

    Args:
        params_file: settings, data, evaluation and devices, and the candidate that chains start from.
        search_file: the space of chains and the objectives.
        trials: total number of chains, including those of earlier runs of this search.
        minutes: time limit of this run; a chain that is predicted to exceed it is not started.
        share_machine: let trainings and measurements of other runs happen at the same time.
        runner: `local`, `ray`, `dask`, or the address of a cluster (docs/operations.md).
        workers: stages that run at a time; chains are tried one after another in any case.

    Raises:
        StageError: a stage that every chain needs failed.
        LilliputError: the input is rejected; no stage has run.
    """
    from flows.chains.chain_runner import ChainRunner
    from flows.chains.study import Budget
    from flows.engine.scheduler import run_stages

    config = read_section(SearchConfig, Path(search_file), "--search")
    folder = retry_while_busy(partial(open_search, Path(params_file), config, search_file))
    with (
        contextlib.chdir(folder),
        wait_for_folder(folder),
        open_runner(runner, workers, folder, share_machine) as stage_runner,
    ):
        run = partial(run_stages, runner=stage_runner)
        chains = ChainRunner(folder, Space(config, load_params(layout.PARAMS), search_file), run)
        show = stage_runner.display.message
        stop_reason = _search(chains, config, search_file, Budget(trials, minutes), time.monotonic(), show)
        run_process(LOG, stage_runner.site)
        record = read_record(SearchRecord, layout.SEARCH)
        show_table(front_rows(record), key="search-front", description=f"{record.study}: Pareto front")
        return stop_reason


def open_search(params_file: Path, config: SearchConfig, search_file: str) -> Path:
    """Checks parameters and space, and returns the workspace of the search.

    Raises:
        ConfigError: parameters or space are invalid.
    """
    params_file = settings_file(params_file)
    params = load_params(params_file)
    Space(config, params, search_file)
    folder = open_workspace(params_file, "search")
    require_benchmarks(params.evaluation.benchmarks, folder)
    return folder


def _search(
    chains: ChainRunner, config: SearchConfig, file: str, budget: Budget, started: float, show: Callable[[str], None]
) -> str:
    from transformers import AutoConfig  # imports torch, which takes seconds

    from flows.chains.study import finished, open_study, run_trials

    reference = chains.make_reference()
    _require_objectives(config, reference)
    space = Space(config, load_params(layout.PARAMS), file, AutoConfig.from_pretrained(layout.model(config.base)))
    study = open_study(space, layout.STUDY, chains.are_current)
    done = finished(study, space)
    for chain in done.values():
        chains.add_finished(chain)
    show(f"{study.study_name}: {len(space.sequences)} sequences are possible, {len(done)} trials done")
    budget = replace(budget, minutes=budget.minutes - (time.monotonic() - started) / 60.0)
    stop_reason = run_trials(study, space, budget, chains.forecast, chains.make, show)
    write_json(layout.SEARCH, search_record(study, space, reference, stop_reason))
    chains.publish()
    decisions = read_record(Promotions, layout.PROMOTION)
    made = finished(study, space)
    write_text(layout.WINNER, winners(space, made, decisions, f"{study.study_name} after {len(made)} chains"))
    return stop_reason


def _require_objectives(config: SearchConfig, reference: Mapping[str, EvaluationRecord]) -> None:
    """Rejects metrics that are unavailable for the base: its descendants would have no value either."""
    if missing := [metric for metric in config.objectives if reference[config.base].number(metric) is None]:
        raise ConfigError(
            f"objectives: {', '.join(missing)}: unavailable in the evaluation of `{config.base}` on this machine; "
            "search for other objectives"
        )


def search_record(
    study: Study, space: Space, reference: Mapping[str, EvaluationRecord], stop_reason: str
) -> SearchRecord:
    """Returns the content of search.json: figures of the base and of each trial, and which trials are on the front."""
    from optuna.trial import FixedTrial

    from flows.chains.study import CANDIDATE, FIGURES, REASON, SECONDS, attempted, pareto_front

    metrics, best = list(space.config.objectives), pareto_front(study)
    rows = [
        TrialRecord(
            candidate=trial.user_attrs[CANDIDATE],
            chain=describe(space.chain(FixedTrial(trial.params))),
            settings={key: setting for key, setting in trial.params.items() if key != "sequence"},
            pareto=trial.user_attrs[CANDIDATE] in best,
            reason=trial.user_attrs.get(REASON),
            seconds=trial.user_attrs.get(SECONDS, 0.0),
            figures=trial.user_attrs.get(FIGURES, {}),
        )
        for trial in attempted(study)
    ]
    return SearchRecord(
        study=study.study_name,
        base=space.config.base,
        objectives={**space.config.objectives},
        stopped=stop_reason,
        sequences=len(space.sequences),
        reference=[
            TrialRecord(candidate=name, chain="", figures={metric: getattr(record, metric) for metric in metrics})
            for name, record in reference.items()
        ],
        trials=rows,
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example:  python -m flows.search --params params.yaml --trials 20 --minutes 120")
def main(
    params: Annotated[Path, typer.Option(help="parameters; the search works in workspaces/<name>.search")] = Path(
        "params.yaml"
    ),
    space: Annotated[Path, typer.Option("--search", help="chains, settings and objectives")] = Path(SPACE),
    trials: Annotated[int, typer.Option(min=1, help="chains to try, including those of earlier runs")] = 20,
    minutes: Annotated[float, typer.Option(min=0, help="of this run; 0 writes the results so far")] = 120.0,
    share_machine: Annotated[bool, typer.Option(help="do not wait for other trainings on this machine")] = False,
    runner: Annotated[str, typer.Option(envvar="LILLIPUT_RUNNER", help=RUNNER_HELP)] = "local",
    workers: Annotated[int, typer.Option(envvar="LILLIPUT_WORKERS", help=WORKERS_HELP)] = 1,
) -> None:
    """Find the Pareto-optimal chains of strategies, and the lines of params.yaml that make them."""
    space = space if space.exists() or str(space) != SPACE else PROJECT / SPACE
    with rejected_input():
        folder = open_search(params, read_section(SearchConfig, space, "--search"), str(space))
        require_runner(runner, workers)
    chosen, file = portable(params), str(space if Path.cwd() == PROJECT else space.resolve())
    os.chdir(PROJECT)
    launch(
        search,
        *(chosen, file, trials, minutes, share_machine, runner, workers),
        run_name=RUN_NAME,
        stop_message="stopped; the same command continues from here, and --minutes 0 writes the results so far",
        needs_prefect=runner_kind(runner) != "local",
    )
    print_search(folder)


if __name__ == "__main__":
    with guarded_output():
        app()
