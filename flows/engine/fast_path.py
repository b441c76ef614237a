"""Handles a command with nothing to do before Prefect is imported, which takes longer than all queries of DVC."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dvc.exceptions import DvcException

from flows.engine.console import print_summary
from flows.engine.lineage import Lineage
from flows.engine.workspace import exclusive, open_workspace
from lilliput.errors import LilliputError
from tasks.registry.moved import update_paths


def try_fast_path(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> bool:
    """Prints the summary and returns True if the whole graph is up to date; otherwise returns False; no stage has run.

    Returns False where Prefect has a server, because each run is a flow run there, and for every error, which the flow
    then reports.

    Args:
        arguments: of the command line; the fast path takes no other option than `--params`.
        environment: tells whether Prefect has a server.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    try:
        options, more = parser.parse_known_args(arguments)
        if more or "PREFECT_API_URL" in environment:
            return False
        folder = open_workspace(options.params)
        with contextlib.chdir(folder), exclusive(folder), contextlib.closing(Lineage(folder)) as lineage:
            if not lineage.unchanged():
                return False
            stages = lineage.stages()
            update_paths()
    except (argparse.ArgumentError, LilliputError, DvcException):
        return False
    print_summary(folder, {stage.name: "Cached" for stage in stages})
    return True
