"""Add the offloading results to the run of the champion on which they were measured."""

from __future__ import annotations

import json

from lilliput.artifacts import write_json
from lilliput.config import Params
from lilliput.errors import ConfigError
from tasks import layout
from tasks.registry import model_versions
from tasks.registry.run_metrics import offloading_metrics


@model_versions.translate_errors()
def log(params: Params, device: str) -> None:
    """Adds the metrics of each policy over the configured link, and writes the model version to logged/<device>.json.

    Logging is separate from measuring, so that results that DVC restored, or that were measured while MLflow was not
    reachable, are logged too.

    Raises:
        ConfigError: the measured champion is not registered.
        RegistryError: MLflow does not answer or refuses.
    """
    del params
    record = json.loads(layout.offload_record(device).read_text(encoding="utf-8"))
    registered = json.loads(layout.REGISTRY.read_text(encoding="utf-8")).get(record["candidate"])
    if registered is None:
        raise ConfigError(
            f"{layout.offload_record(device)} was measured with {record['candidate']}, which is not registered; "
            "run `dvc repro`"
        )
    metrics = offloading_metrics(device, record)
    model_versions.add_metrics(model_versions.client(), registered["version"], layout.offload_record(device), metrics)
    write_json(layout.logged(device), registered)
