"""Runs the work of a command: as a Prefect flow run where Prefect has a server, otherwise in this process alone.

Prefect would start a temporary server otherwise: 20 to 30 seconds for a run that nobody watches.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from flows.engine.prefect_server import server_configured
from flows.engine.run_context import log_to_terminal
from flows.engine.stopping import rejected_input, stoppable


def launch(
    work: Callable[..., Any],
    *arguments: object,
    run_name: str,
    stop_message: str,
    needs_prefect: bool = False,
    verbose: bool = False,
) -> Any:
    """Returns `work(*arguments)`; if it fails or is interrupted, ends this process with one message.

    Args:
        work: raises LilliputError or an error of DVC for what a person can repair.
        *arguments: of `work`.
        run_name: of the flow run, with the names of arguments in braces.
        stop_message: printed after Ctrl-C (exit code 130) and SIGTERM (143); says how to continue.
        needs_prefect: also without a configured server; Prefect then starts one for this run.
        verbose: prints the log of the run too, not only its warnings.
    """
    if needs_prefect or server_configured():
        if not verbose:  # Prefect reads it at import; its server has all log lines
            os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
        from flows.engine.prefect_flow import run_flow, to_flow  # imports Prefect

        return run_flow(to_flow(work, run_name), *arguments, stop_message=stop_message)
    log_to_terminal(verbose)
    with stoppable(stop_message), rejected_input():
        return work(*arguments)
