"""Add what offloading brings to the run of the champion it was measured on."""

from __future__ import annotations

import json

from lilliput.artifacts import write_json
from lilliput.config import Params
from lilliput.errors import ConfigError
from tasks import layout
from tasks.registry import model_versions
from tasks.registry.run_metrics import of_offloading


@model_versions.in_reach()
def log(params: Params, device: str) -> None:
    """Writes logged/<device>.json: the version that has what each policy reaches over the configured link.

    Apart from measuring, so that MLflow hears of a result that DVC restored, and of one it was not there for.

    Raises:
        ConfigError: the champion that was asked is not registered.
        RegistryError: MLflow does not answer, or refuses.
    """
    del params
    record = json.loads(layout.offload_record(device).read_text(encoding="utf-8"))
    registered = json.loads(layout.REGISTRY.read_text(encoding="utf-8")).get(record["candidate"])
    if registered is None:
        raise ConfigError(f"{layout.offload_record(device)} is of {record['candidate']}, which is not registered")
    numbers = of_offloading(device, record)
    model_versions.add_metrics(model_versions.client(), registered["version"], layout.offload_record(device), numbers)
    write_json(layout.logged(device), registered)
