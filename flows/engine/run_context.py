"""What a run shows in Prefect if it is a flow run there, and its log otherwise. Imports no Prefect itself."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks import layout
from tasks.process.console import open_log

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
    """Returns the logger of this run: Prefect's in a flow run, otherwise that of `logs/run.log`."""
    if not flow_run_id():
        return _log
    from prefect import get_run_logger

    return get_run_logger()


def log_to_terminal(verbose: bool = False) -> None:
    """Prints warnings of a run without Prefect on stderr, and everything if `verbose`."""
    if _log.handlers:
        return
    handler = _StderrHandler(logging.INFO if verbose else logging.WARNING)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False


@contextmanager
def log_to_file(folder: Path) -> Iterator[None]:
    """Writes the log of a run to `logs/run.log` in `folder`, in Prefect's format; Prefect keeps that of a flow run.

    Raises:
        ConfigError: it cannot be written.
    """
    if flow_run_id():
        yield
        return
    with open_log(folder / layout.log("run")) as stream:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(
            logging.Formatter("%(asctime)s.%(msecs)03d | %(levelname)-7s | %(message)s", datefmt="%H:%M:%S")
        )
        _log.addHandler(handler)
        try:
            yield
        finally:
            _log.removeHandler(handler)


class _StderrHandler(logging.Handler):
    """Prints on the present `sys.stderr`: a progress bar replaces it for a time."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            print(self.format(record), file=sys.stderr or io.StringIO())


def show_table(rows: Sequence[dict[str, Any]], key: str, description: str) -> None:
    """Shows `rows` in the Prefect UI; nothing without a flow run."""
    if not flow_run_id() or not rows:
        return
    from prefect.artifacts import create_table_artifact

    create_table_artifact(list(rows), key=key, description=description)


def show_link(address: str, key: str, description: str) -> None:
    """Shows a link in the Prefect UI; nothing without a flow run."""
    if not flow_run_id():
        return
    from prefect.artifacts import create_link_artifact

    create_link_artifact(address, key=key, description=description)


def show_markdown(text: str, key: str, description: str) -> None:
    """Shows `text` in the Prefect UI; nothing without a flow run."""
    if not flow_run_id():
        return
    from prefect.artifacts import create_markdown_artifact

    create_markdown_artifact(text, key=key, description=description)
