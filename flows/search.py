"""Which sequence of strategies wins? Grows candidates from one base under a budget and writes down the best."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from dvc.exceptions import DvcException
from optuna import Study
from optuna.trial import FixedTrial
from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas import State
from prefect.states import Completed, Failed

from flows.chains.chain_runner import Workshop
from flows.chains.study import CANDIDATE, FIGURES, REASON, SECONDS, Budget, begun, finished, front, grow, open_study
from flows.engine.console import fail, front_rows, guarded_output, print_search
from flows.engine.lineage import Stage
from flows.engine.process import run_process
from flows.engine.runners import RUNNER_HELP, WORKERS_HELP, open_crew, require_runner
from flows.engine.scheduler import run_stages
from flows.engine.stopping import run_flow
from flows.engine.waiting import turn_in, when_free
from flows.engine.workspace import PROJECT, open_workspace
from lilliput.artifacts import write_json, write_text
from lilliput.config import read_section
from lilliput.errors import ConfigError, LilliputError
from lilliput.evaluate.benchmarks import require_benchmarks
from lilliput.params import load_params
from lilliput.promote import metric_value
from lilliput.redaction import redacted
from lilliput.search import SearchConfig, Space, describe, winners
from tasks import layout

SPACE = "examples/search.yaml"
LOG = Stage("search", "python -m tasks search", "log the search to MLflow")


@flow(name="search", flow_run_name="search-{params_file}", validate_parameters=False)
def search(
    params_file: str = "params.yaml",
    search_file: str = SPACE,
    trials: int = 20,
    minutes: float = 120.0,
    share_machine: bool = False,
    runner: str = "local",
    workers: int = 1,
) -> State:
    """Tries chains of strategies in a workspace of its own, each stage a Prefect task, and writes down what it found.

    Args:
        params_file: settings, data, evaluation and devices, and the candidate that chains start from.
        search_file: the space of chains and the objectives.
        trials: chains in all, those of earlier runs of this search included.
        minutes: no chain is begun that is expected to take this run beyond them.
        share_machine: let trainings and measurements of other runs happen at the same time.
        runner: who does the work: `local`, `ray`, `dask`, or a cluster's address (docs/operations.md).
        workers: stages at work at a time; chains are tried one after another all the same.
    """
    try:
        config = read_section(SearchConfig, Path(search_file), "--search")
        folder = when_free(partial(open_search, Path(params_file), config, search_file))
        with contextlib.chdir(folder), turn_in(folder), open_crew(runner, workers, folder, share_machine) as crew:
            run = partial(run_stages, crew=crew)
            workshop = Workshop(folder, Space(config, load_params(layout.PARAMS), search_file), run)
            stopped = _search(workshop, config, search_file, Budget(trials, minutes), time.monotonic())
            run_process(LOG, crew.site)
            found = json.loads(layout.SEARCH.read_text(encoding="utf-8"))
            create_table_artifact(front_rows(found), key="search-front", description=f"{found['study']}: Pareto front")
            return Completed(message=stopped)
    except (LilliputError, DvcException) as error:
        return Failed(message=redacted(str(error)))


def open_search(params_file: Path, config: SearchConfig, search_file: str) -> Path:
    """The workspace of a search over `params_file`, checked and ready.

    Raises:
        ConfigError: parameters or space are refused.
    """
    params = load_params(params_file)
    Space(config, params, search_file)
    folder = open_workspace(params_file, "search")
    require_benchmarks(params.evaluation.benchmarks, folder)
    return folder


def _search(workshop: Workshop, config: SearchConfig, file: str, budget: Budget, started: float) -> str:
    from transformers import AutoConfig  # brings torch, which takes seconds to import

    reference, say = workshop.make_reference(), get_run_logger().info
    _require_objectives(config, reference)
    space = Space(config, load_params(layout.PARAMS), file, AutoConfig.from_pretrained(layout.model(config.base)))
    study = open_study(space, layout.STUDY, workshop.holds)
    for chain in finished(study, space).values():
        workshop.keep(chain)
    say(
        "%s: %d sequences are possible, %d trials done",
        study.study_name,
        len(space.sequences),
        len(finished(study, space)),
    )
    budget = replace(budget, minutes=budget.minutes - (time.monotonic() - started) / 60.0)
    stopped = grow(study, space, budget, workshop.forecast, workshop.make, say)
    write_json(layout.SEARCH, findings(study, space, reference, stopped))
    workshop.publish()
    decisions = json.loads(layout.PROMOTION.read_text(encoding="utf-8"))
    made = finished(study, space)
    write_text(layout.WINNER, winners(space, made, decisions, f"{study.study_name} after {len(made)} chains"))
    return stopped


def _require_objectives(config: SearchConfig, reference: Mapping[str, Mapping[str, Any]]) -> None:
    """A metric that the base has no value for will have none for its descendants."""
    if missing := [metric for metric in config.objectives if metric_value(reference[config.base], metric) is None]:
        raise ConfigError(
            f"objectives: {', '.join(missing)}: unavailable in the evaluation of `{config.base}` on this machine; "
            "search for other objectives"
        )


def findings(study: Study, space: Space, reference: Mapping[str, Mapping[str, Any]], stopped: str) -> dict[str, Any]:
    """What search.json holds: the base's and each trial's figures, and which trials are on the front."""
    metrics, best = list(space.config.objectives), front(study)
    rows = [
        {
            "candidate": trial.user_attrs[CANDIDATE],
            "chain": describe(space.chain(FixedTrial(trial.params))),
            "settings": {key: setting for key, setting in trial.params.items() if key != "sequence"},
            "pareto": trial.user_attrs[CANDIDATE] in best,
            "reason": trial.user_attrs.get(REASON),
            "seconds": trial.user_attrs.get(SECONDS, 0.0),
            "figures": trial.user_attrs.get(FIGURES, {}),
        }
        for trial in begun(study)
    ]
    return {
        "study": study.study_name,
        "base": space.config.base,
        "objectives": dict(space.config.objectives),
        "stopped": stopped,
        "sequences": len(space.sequences),
        "reference": [
            {"candidate": name, "chain": "", "figures": {metric: record[metric] for metric in metrics}}
            for name, record in reference.items()
        ],
        "trials": rows,
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example:  python -m flows.search --params params.yaml --trials 20 --minutes 120")
def main(
    params: Annotated[Path, typer.Option(help="parameters; the search works in workspaces/<name>.search")] = Path(
        "params.yaml"
    ),
    space: Annotated[Path, typer.Option("--search", help="which chains, which settings, which objectives")] = Path(
        SPACE
    ),
    trials: Annotated[int, typer.Option(min=1, help="chains to try, those of earlier runs included")] = 20,
    minutes: Annotated[float, typer.Option(min=0, help="of this run; 0 writes down what is finished")] = 120.0,
    share_machine: Annotated[bool, typer.Option(help="do not wait for other trainings on this machine")] = False,
    runner: Annotated[str, typer.Option(envvar="LILLIPUT_RUNNER", help=RUNNER_HELP)] = "local",
    workers: Annotated[int, typer.Option(envvar="LILLIPUT_WORKERS", help=WORKERS_HELP)] = 1,
) -> None:
    """Find the chains of strategies that none beats on every objective, and the lines of params.yaml that make them."""
    try:
        folder = open_search(params, read_section(SearchConfig, space, "--search"), str(space))
        require_runner(runner, workers)
    except (LilliputError, DvcException) as error:
        fail(str(error), 2)
    os.chdir(PROJECT)
    stopped = "stopped; the same command goes on from here, and --minutes 0 writes down what is finished"
    arguments = (str(params), str(space), trials, minutes, share_machine, runner, workers)
    state = run_flow(search, *arguments, stopped=stopped)
    if not state.is_completed():
        fail(state.message or "the search did not finish", 2)
    print_search(folder)


if __name__ == "__main__":
    with guarded_output():
        app()
