"""Promotion of champions that machines share: one decision at a time, and an event in Prefect for each change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.engine.prefect_server import server_configured
from flows.engine.run_context import flow_run_id
from lilliput.errors import ConfigError
from tasks import layout

LIMIT = "lilliput-promotion"
CHANGED = "lilliput.champion.changed"
LEASE_S = 60.0  # a dead holder loses the limit after this time; a living one renews it
TIMEOUT_S = 240.0


@contextmanager
def exclusive_promotion(folder: Path) -> Iterator[None]:
    """Serializes decisions on the champions of `folder`; emits an event for each change at the end.

    If machines share a registry (MLFLOW_TRACKING_URI) and a Prefect server (PREFECT_API_URL), decisions wait for each
    other by a global concurrency limit of that server. Otherwise only the lock of the folder's own store applies
    (`tasks.registry.model_versions`). Events wait in the outbox until a run that Prefect's server sees.

    Raises:
        ConfigError: another decision does not end.
    """
    if not _shared(folder):
        yield
    else:
        from prefect.client.orchestration import get_client
        from prefect.concurrency.sync import concurrency

        with get_client(sync_client=True) as client:
            client.upsert_global_concurrency_limit_by_name(LIMIT, 1)
        try:
            with concurrency(LIMIT, timeout_seconds=TIMEOUT_S, lease_duration=LEASE_S, strict=True):
                yield
        except TimeoutError:
            raise ConfigError(
                f"another promotion has held `{LIMIT}` for {TIMEOUT_S:g} s; wait for it and try again "
                f"(`prefect gcl inspect {LIMIT}` shows the limit)"
            ) from None
    if flow_run_id() or server_configured():
        emit_changes(folder)


def emit_changes(folder: Path) -> None:
    """Emits a Prefect event for each change of a champion in `folder` that has none yet."""
    from prefect.events import emit_event

    from tasks.registry import outbox

    for change in outbox.read(folder):
        resource = {"prefect.resource.id": f"lilliput.champion.{change['device']}", "lilliput.folder": str(folder)}
        emit_event(CHANGED, resource, payload=change)
    outbox.clear(folder)


def _shared(folder: Path) -> bool:
    """Whether other machines may decide on these champions too."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    return address.startswith("http") and not layout.is_workspace(folder) and server_configured()
