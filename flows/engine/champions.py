"""Champions that machines share: decided by one at a time, and told to Prefect when they change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from lilliput.errors import ConfigError
from tasks import layout
from tasks.registry import outbox

LIMIT = "lilliput-promotion"
CHANGED = "lilliput.champion.changed"
LEASE_S = 60.0  # a holder that dies lets go after this time; one that lives renews
PATIENCE_S = 240.0


@contextmanager
def deciding(folder: Path) -> Iterator[None]:
    """Around every decision on the champions of `folder`: holds the registry, and afterwards tells of who is new.

    Where MLFLOW_TRACKING_URI names a registry that machines share and PREFECT_API_URL a server that they share, too,
    decisions wait for each other by that server's global concurrency limit. Elsewhere the lock of the folder's own
    store (`tasks.registry.model_versions.promotion_lock`) is all there is.

    Raises:
        ConfigError: another decision does not end.
    """
    if not _shared(folder):
        yield
    else:
        with get_client(sync_client=True) as client:
            client.upsert_global_concurrency_limit_by_name(LIMIT, 1)
        try:
            with concurrency(LIMIT, timeout_seconds=PATIENCE_S, lease_duration=LEASE_S, strict=True):
                yield
        except TimeoutError:
            raise ConfigError(
                f"another promotion has held `{LIMIT}` for {PATIENCE_S:g} s; wait for it and try again "
                f"(`prefect gcl inspect {LIMIT}` shows the limit)"
            ) from None
    if flow_run.id or PREFECT_API_URL.value():
        tell_changes(folder)


def tell_changes(folder: Path) -> None:
    """Tells Prefect, as an event, of each champion in `folder` that changed and was not told of yet."""
    for change in outbox.read(folder):
        resource = {"prefect.resource.id": f"lilliput.champion.{change['device']}", "lilliput.folder": str(folder)}
        emit_event(CHANGED, resource, payload=change)
    outbox.clear(folder)


def _shared(folder: Path) -> bool:
    """Whether other machines may decide on these champions, too."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    return address.startswith("http") and not layout.is_workspace(folder) and bool(PREFECT_API_URL.value())
