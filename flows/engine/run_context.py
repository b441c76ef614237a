"""What a run shows in Prefect if it is a flow run there, and on the terminal otherwise. Imports no Prefect itself."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

_log = logging.getLogger("lilliput.run")


def flow_run_id() -> str:
    """Returns the id of Prefect's flow run that this process works for; empty if there is none."""
    if "prefect" not in sys.modules:  # only a flow run imports it
        return ""
    from prefect.runtime import flow_run

    return str(flow_run.id or "")


def deployment_id() -> str:
    """Returns the id of the Prefect deployment that started this run; empty if none did."""
    if not flow_run_id():
        return ""
    from prefect.runtime import deployment

    return str(deployment.id or "")


def run_logger() -> Any:
    """Returns the logger of this run: Prefect's in a flow run, otherwise one that `log_to_terminal` shows."""
    if not flow_run_id():
        return _log
    from prefect import get_run_logger

    return get_run_logger()


def log_to_terminal() -> None:
    """Prints the log of a run without Prefect on stderr, in Prefect's format."""
    if _log.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d | %(levelname)-7s | %(message)s", datefmt="%H:%M:%S")
    )
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False


def show_table(rows: Sequence[dict[str, Any]], key: str, description: str) -> None:
    """Shows `rows` in the Prefect UI; nothing without a flow run."""
    if not flow_run_id() or not rows:
        return
    from prefect.artifacts import create_table_artifact

    create_table_artifact(list(rows), key=key, description=description)


def show_markdown(text: str, key: str, description: str) -> None:
    """Shows `text` in the Prefect UI; nothing without a flow run."""
    if not flow_run_id():
        return
    from prefect.artifacts import create_markdown_artifact

    create_markdown_artifact(text, key=key, description=description)
