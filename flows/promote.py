"""Decides champions by hand: promotes now, answers pending approvals, rolls back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.engine.champions import exclusive_promotion
from flows.engine.console import print_decisions
from flows.engine.output import fail, guarded_output
from flows.engine.stopping import rejected_input
from flows.engine.waiting import retry_while_busy, wait_for_folder
from flows.engine.workspace import exclusive, open_workspace
from lilliput.errors import ConfigError
from lilliput.params import load_params
from tasks import layout

if TYPE_CHECKING:  # brings MLflow
    from tasks.registry.approvals import ApprovalAnswer, Proposal

RUN_NAME = "promote-{params_file}"
NEXT = "`dvc repro` brings bundles and report up to date."


def promote(params_file: str = "params.yaml", ask_minutes: float = 0.0) -> str:
    """Decides the champion of each device, as the stage `promote` does; runs no stage. Returns what to do next.

    Args:
        params_file: the project's params.yaml, or another file, to decide in the workspace of that file.
        ask_minutes: how long to wait, for each device with `promotion.<device>.approval`, for a person's answer in
            Prefect's UI. 0: do not ask; such champions stay pending.

    Raises:
        LilliputError: the registry does not answer, or something is missing.
    """
    promote_now(Path(params_file), partial(request_approval, minutes=ask_minutes) if ask_minutes else lambda _: None)
    return NEXT


def promote_now(params_file: Path, decide: Callable[[Proposal], ApprovalAnswer | None]) -> None:
    """Decides the champion of each device; `decide` returns a person's answer to a proposal, None without one."""
    from tasks import promote as promotion  # imports MLflow

    folder = retry_while_busy(partial(open_workspace, params_file))
    with contextlib.chdir(folder), wait_for_folder(folder):
        pending = promotion.proposals(load_params(layout.PARAMS))
    # No lock is held meanwhile; an answer applies only to the version of its proposal.
    answers = {proposal.device: answer for proposal in pending if (answer := decide(proposal))}
    with contextlib.chdir(folder), wait_for_folder(folder), exclusive_promotion(folder):
        promotion.promote(load_params(layout.PARAMS), answers)


def request_approval(proposal: Proposal, minutes: float, poll_s: int = 10) -> ApprovalAnswer | None:
    """Pauses the flow run and returns a person's answer in Prefect's UI; None if there is none in time."""
    from prefect import pause_flow_run
    from prefect.artifacts import create_markdown_artifact
    from prefect.exceptions import FlowPauseTimeout
    from prefect.input import RunInput

    from tasks.registry.approvals import ApprovalAnswer

    class Approval(RunInput):  # the form in Prefect's UI
        approve: bool
        because: str = ""

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
    with rejected_input():
        folder = open_workspace(params)
        _require_devices(folder, [rollback] if rollback else [], "--rollback")
        _require_devices(folder, approvals, "--approve, --deny")
        unanswered: list[str] = []
        if rollback:
            _roll_back(folder, rollback, because)
        else:
            unanswered = _promote_with(params, approvals, because)
    print_decisions(folder, rollback)
    if unanswered:
        fail(f"no new champion waits for approval on {', '.join(unanswered)}; see `promotion.<device>.approval`", 2)
    print(f"\nNext: {NEXT}")


def _require_devices(folder: Path, devices: Iterable[str], option: str) -> None:
    """Rejects devices without rules, before MLflow is imported."""
    known = load_params(folder / layout.PARAMS).promotion
    if unknown := [device for device in devices if device not in known]:
        raise ConfigError(f"{option} {', '.join(unknown)}: no such device under `promotion`: {', '.join(known)}")


def _roll_back(folder: Path, device: str, because: str) -> None:
    from tasks import promote as promotion  # imports MLflow

    with contextlib.chdir(folder), exclusive(folder), exclusive_promotion(folder):
        promotion.roll_back(load_params(layout.PARAMS), device, because)


def _promote_with(params: Path, approvals: Mapping[str, bool], because: str) -> list[str]:
    """Promotes with a person's answers by device; returns the devices that no proposal waits for."""
    from tasks.registry.approvals import ApprovalAnswer

    unanswered = dict(approvals)

    def decide(proposal: Proposal) -> ApprovalAnswer | None:
        answer = unanswered.pop(proposal.device, None)
        return None if answer is None else ApprovalAnswer(proposal.version, answer, because)

    promote_now(params, decide)
    return list(unanswered)


if __name__ == "__main__":
    with guarded_output():
        app()
