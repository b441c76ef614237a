"""Makes a project of the user's own: a short settings file, sample data, and the pipeline."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from flows.engine.folders import PROJECT, SETTINGS
from flows.engine.output import guarded_output
from flows.engine.own_project import in_git
from flows.engine.stopping import rejected_input
from flows.engine.workspace import open_workspace
from lilliput.artifacts import write_text
from lilliput.errors import ConfigError

SAMPLE = Path("examples/questions.jsonl")
SHORT = """\
# Settings of this project. `lilliput params --show` lists all of them, defaults included.
data:
  source: questions.jsonl   # your own questions or chats, one a line
recipe: pocket              # or quick: without pruning and distillation
device: phone-4gb           # or phone-12gb, board, laptop, edge-server
# source:
#   model: path:/home/me/my-model   # or hub:<org>/<model>; without it the built-in model, SmolLM2-135M-Instruct
"""


def initialise(folder: Path, settings: str = SHORT, data: Path | None = PROJECT / SAMPLE) -> list[str]:
    """Makes a project in `folder`; returns what was done, a line each. Files that exist are kept.

    Args:
        folder: is made if it does not exist.
        settings: the content of its settings file.
        data: is copied into it unless a file of that name is there; None if the settings name data elsewhere.

    Raises:
        ConfigError: the folder has a settings file already, is a file, or is the clone.
    """
    _require_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = [f"{SETTINGS}: settings"]
    write_text(folder / SETTINGS, settings)
    if data and not (folder / data.name).exists():
        shutil.copyfile(data, folder / data.name)
        done.append(f"{data.name}: {'sample questions' if data.name == SAMPLE.name else 'a copy of your data'}")
    if not in_git(folder) and shutil.which("git"):
        subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
        done.append("git: a new repository, because this folder was in none")
    open_workspace(folder / SETTINGS)
    return [*done, "DVC: a new repository, and dvc.yaml, params.yaml and .gitignore, which Lilliput writes"]


def _require_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name a folder")
    if (folder / SETTINGS).exists():
        raise ConfigError(f"{folder / SETTINGS}: exists already; edit it, or name another folder")
    if (folder / "dvc.yaml").exists():
        raise ConfigError(f"{folder}: has a pipeline already (dvc.yaml), which would be replaced; name another folder")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Examples:  python -m flows.init my-project  ·  … .")
def main(folder: Annotated[Path, typer.Argument(metavar="DIR", help="is made if it does not exist")] = Path()) -> None:
    """Make a project in DIR: a settings file of a few lines, sample questions, git and DVC."""
    with rejected_input():
        done = initialise(folder)
    print(f"A project in {folder.resolve()}:", *(f"  {line}" for line in done), sep="\n")
    steps = [] if folder.resolve() == Path.cwd() else [f"cd {folder}"]
    print("\nNext:", *(f"  {step}" for step in [*steps, "lilliput plan", "lilliput run"]), sep="\n")


if __name__ == "__main__":
    with guarded_output():
        app()
