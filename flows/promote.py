"""Decides champions by hand: promotes now, answers pending approvals, rolls back."""

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

from flows.engine.champions import exclusive_promotion
from flows.engine.console import fail, guarded_output, print_decisions
from flows.engine.waiting import retry_while_busy, wait_for_folder
from flows.engine.workspace import exclusive, open_workspace
from lilliput.errors import LilliputError
from lilliput.params import load_params
from lilliput.redaction import redacted
from tasks import layout
from tasks import promote as promotion
from tasks.promote import Proposal
from tasks.registry.approvals import ApprovalAnswer

NEXT = "`dvc repro` brings bundles and report up to date."


class Approval(RunInput):
    """The form in Prefect's UI by which a person approves or denies a new champion."""

    approve: bool
    because: str = ""


@flow(name="promote", flow_run_name="promote-{params_file}", validate_parameters=False)
def promote(params_file: str = "params.yaml", ask_minutes: float = 0.0) -> State:
    """Decides the champion of each device, as the stage `promote` does; runs no stage.

    Args:
        params_file: the project's params.yaml, or another file, to decide in the workspace of that file.
        ask_minutes: how long to wait, for each device with `promotion.<device>.approval`, for a person's answer in
            Prefect's UI. 0: do not ask; such champions stay pending.
    """
    try:
        promote_now(
            Path(params_file), partial(request_approval, minutes=ask_minutes) if ask_minutes else lambda _: None
        )
    except LilliputError as error:
        return Failed(message=redacted(str(error)))
    return Completed(message=NEXT)


def promote_now(params_file: Path, decide: Callable[[Proposal], ApprovalAnswer | None]) -> None:
    """Decides the champion of each device; `decide` returns a person's answer to a proposal, None without one."""
    folder = retry_while_busy(partial(open_workspace, params_file))
    with contextlib.chdir(folder), wait_for_folder(folder):
        pending = promotion.proposals(load_params(layout.PARAMS))
    # No lock is held meanwhile; an answer applies only to the version of its proposal.
    answers = {proposal.device: answer for proposal in pending if (answer := decide(proposal))}
    with contextlib.chdir(folder), wait_for_folder(folder), exclusive_promotion(folder):
        promotion.promote(load_params(layout.PARAMS), answers)


def request_approval(proposal: Proposal, minutes: float, poll_s: int = 10) -> ApprovalAnswer | None:
    """Pauses the flow run and returns a person's answer in Prefect's UI; None if there is none in time."""
    title = f"{proposal.device}: {proposal.candidate} (version {proposal.version})"
    form = Approval.with_initial_data(description=f"## {title}\n\n{proposal.reason}", approve=False)
    create_markdown_artifact(f"{title}\n\n{proposal.reason}", key=f"proposal-{proposal.device}")
    try:
        approval = pause_flow_run(wait_for_input=form, timeout=int(60 * minutes), poll_interval=poll_s)
    except FlowPauseTimeout:
        return None
    return ApprovalAnswer(proposal.version, approval.approve, approval.because)


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
    """Decide the champion of each device from the registered evaluations, or roll back."""
    approvals = dict.fromkeys(approve or [], True) | dict.fromkeys(deny or [], False)

    def decide(proposal: Proposal) -> ApprovalAnswer | None:
        device = proposal.device
        return ApprovalAnswer(proposal.version, approvals.pop(device), because) if device in approvals else None

    try:
        folder = open_workspace(params)
        if rollback:
            with contextlib.chdir(folder), exclusive(folder), exclusive_promotion(folder):
                promotion.roll_back(load_params(layout.PARAMS), rollback, because)
        else:
            promote_now(params, decide)
    except LilliputError as error:
        fail(str(error), 2)
    print_decisions(folder, rollback)
    if approvals:
        fail(f"no new champion waits for approval on {', '.join(approvals)}; see `promotion.<device>.approval`", 2)
    print(f"\nNext: {NEXT}")


if __name__ == "__main__":
    with guarded_output():
        app()
