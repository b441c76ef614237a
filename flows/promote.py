"""The champions by hand: decide now, answer what waits for a person, go back to the champion before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from prefect import flow, pause_flow_run
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas import State
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput
from prefect.states import Completed, Failed

from flows.engine.champions import deciding
from flows.engine.console import fail, guarded_output, print_decisions
from flows.engine.waiting import turn_in, when_free
from flows.engine.workspace import held, open_workspace
from lilliput.errors import LilliputError
from lilliput.params import load_params
from lilliput.redaction import redacted
from tasks import layout
from tasks import promote as promotion
from tasks.promote import ApprovalAnswer, Proposal

NEXT = "`dvc repro` brings bundles and report up to date."


class Approval(RunInput):
    """What a person is asked before a champion changes."""

    approve: bool
    because: str = ""


@flow(name="promote", flow_run_name="promote-{params_file}", validate_parameters=False)
def promote(params_file: str = "params.yaml", ask_minutes: float = 0.0) -> State:
    """Decides who is champion of each device, as the stage `promote` does; no stage is run.

    Args:
        params_file: the project's params.yaml, or another file, which means its workspace.
        ask_minutes: how long to wait for a person's answer where `promotion.<device>.approval` asks for it, device by
            device; Prefect's UI takes it. 0: not at all, and what needs it waits.
    """
    try:
        promote_now(Path(params_file), partial(ask, minutes=ask_minutes) if ask_minutes else lambda _: None)
    except LilliputError as error:
        return Failed(message=redacted(str(error)))
    return Completed(message=NEXT)


def promote_now(params_file: Path, answer: Callable[[Proposal], ApprovalAnswer | None]) -> None:
    """Decides who is champion of each device; `answer` says what a person wants of a champion that waits for one."""
    folder = when_free(partial(open_workspace, params_file))
    with contextlib.chdir(folder), turn_in(folder):
        waiting = promotion.proposals(load_params(layout.PARAMS))
    # Nothing is held while a person thinks; the answer counts for the version it was given about.
    answers = {proposal.device: said for proposal in waiting if (said := answer(proposal))}
    with contextlib.chdir(folder), turn_in(folder), deciding(folder):
        promotion.promote(load_params(layout.PARAMS), answers)


def ask(proposal: Proposal, minutes: float, poll_s: int = 10) -> ApprovalAnswer | None:
    """What a person said in Prefect's UI, for which the flow run pauses; None if nobody did in time."""
    title = f"{proposal.device}: {proposal.candidate} (version {proposal.version})"
    wanted = Approval.with_initial_data(description=f"## {title}\n\n{proposal.reason}", approve=False)
    create_markdown_artifact(f"{title}\n\n{proposal.reason}", key=f"proposal-{proposal.device}")
    try:
        said = pause_flow_run(wait_for_input=wanted, timeout=int(60 * minutes), poll_interval=poll_s)
    except FlowPauseTimeout:
        return None
    return ApprovalAnswer(proposal.version, said.approve, said.because)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    epilog="Examples:  python -m flows.promote  ·  … --rollback phone-4gb --because 'answers in rhymes'  ·  "
    "… --approve board"
)
def main(
    params: Annotated[Path, typer.Option(help="parameters; another file means workspaces/<name>")] = Path(
        "params.yaml"
    ),
    rollback: Annotated[str | None, typer.Option(help="restore the champion that this device had before")] = None,
    approve: Annotated[list[str] | None, typer.Option(help="agree to this device's new champion (repeatable)")] = None,
    deny: Annotated[list[str] | None, typer.Option(help="do not agree (repeatable); it is not proposed again")] = None,
    because: Annotated[str, typer.Option(help="why, to be stored on the version")] = "",
) -> None:
    """Decide anew who is champion of each device, from what is evaluated and registered; or go back."""
    said = dict.fromkeys(approve or [], True) | dict.fromkeys(deny or [], False)

    def answer(proposal: Proposal) -> ApprovalAnswer | None:
        return ApprovalAnswer(proposal.version, said.pop(proposal.device), because) if proposal.device in said else None

    try:
        folder = open_workspace(params)
        if rollback:
            with contextlib.chdir(folder), held(folder), deciding(folder):
                promotion.roll_back(load_params(layout.PARAMS), rollback, because)
        else:
            promote_now(params, answer)
    except LilliputError as error:
        fail(str(error), 2)
    print_decisions(folder, rollback)
    if said:
        fail(f"no new champion waits for approval on {', '.join(said)}; see `promotion.<device>.approval`", 2)
    print(f"\nNext: {NEXT}")


if __name__ == "__main__":
    with guarded_output():
        app()
