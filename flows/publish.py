"""Publishes a champion's bundle on the Hugging Face hub; shows it first and uploads it only with --upload."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer

from flows.engine.console import print_publication
from flows.engine.output import fail, guarded_output
from flows.engine.stopping import rejected_input
from flows.engine.workspace import open_workspace
from lilliput.errors import PublishError
from lilliput.params import load_params
from tasks import layout

TOKEN = "HF_TOKEN"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example:  python -m flows.publish my-org/pocket --device phone-4gb")
def main(
    repository: Annotated[str, typer.Argument(help="<organisation>/<name> on the hub")],
    device: Annotated[str, typer.Option(help="whose bundle")],
    params: Annotated[Path, typer.Option(help="parameters; another file means workspaces/<name>")] = Path(
        "params.yaml"
    ),
    do_upload: Annotated[bool, typer.Option("--upload", help=f"upload; needs a token in {TOKEN}")] = False,
    public: Annotated[bool, typer.Option(help="make a new repository public")] = False,
) -> None:
    """Show the files, sizes, sha256 and model card of a device's champion; upload them with --upload."""
    token = os.environ.get(TOKEN, "")
    if do_upload and not token:
        fail(f"--upload needs a token that may write to {repository} in {TOKEN}", 2)
    with rejected_input(), contextlib.chdir(open_workspace(params)):
        settings = load_params(layout.PARAMS)
        if device not in settings.devices:
            raise PublishError(f"--device {device}: params.yaml has under devices: {', '.join(settings.devices)}")
        from tasks.publish import prepare, upload  # imports MLflow

        publication = prepare(settings, device)
        print_publication(publication, repository)
        if do_upload:
            print(upload(publication, repository, token, private=not public))
        else:
            print("\nNothing was uploaded; --upload does it.")


if __name__ == "__main__":
    with guarded_output():
        app()
