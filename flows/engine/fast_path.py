"""Answers a command that finds nothing to do before Prefect is there, which takes longer than all the asking."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dvc.exceptions import DvcException

from flows.engine.console import print_summary
from flows.engine.lineage import Lineage
from flows.engine.workspace import held, open_workspace
from lilliput.errors import LilliputError
from tasks.registry.moved import update_paths


def answered(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> bool:
    """Prints the summary and says yes if the whole graph is up to date; else says no, and nothing has happened.

    Not where Prefect has a server, which somebody may look at: there each run is a flow run. Whatever is wrong is left
    for the flow to say.

    Args:
        arguments: of the command line; any beside `--params` means that more than this was asked.
        environment: says whether Prefect has a server.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    try:
        asked, more = parser.parse_known_args(arguments)
        if more or "PREFECT_API_URL" in environment:
            return False
        folder = open_workspace(asked.params)
        with contextlib.chdir(folder), held(folder):
            lineage = Lineage(folder)
            if not lineage.unchanged():
                return False
            stages = lineage.stages()
            update_paths()
    except (argparse.ArgumentError, LilliputError, DvcException):
        return False
    print_summary(folder, {stage.name: "Cached" for stage in stages})
    return True
