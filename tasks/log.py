"""Log the offloading results as a nested run of the champion on which they were measured."""

from __future__ import annotations

from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from lilliput.artifacts import file_sha256, read_record, write_json
from lilliput.config import Params
from lilliput.errors import ConfigError
from lilliput.records import OffloadRecord
from tasks import layout
from tasks.process.stage_times import times_of
from tasks.records import find_registry
from tasks.registry import get_or_create, model_versions
from tasks.registry.run_metrics import offloading_metrics

DIGEST_TAG = "lilliput.offload_sha256"


@model_versions.translate_errors()
def log(params: Params, device: str) -> None:
    """Logs the metrics of each policy over the configured link, and writes the model version to logged/<device>.json.

    Idempotent: the same results keep their run.

    Logging is separate from measuring, so that results that DVC restored, or that were measured while MLflow was not
    reachable, are logged too.

    Raises:
        ConfigError: the measured champion is not registered.
        RegistryError: MLflow does not answer or refuses.
    """
    del params
    record = read_record(OffloadRecord, layout.offload_record(device))
    registered = find_registry().get(record.candidate)
    if registered is None:
        raise ConfigError(
            f"{layout.offload_record(device)} was measured with {record.candidate}, which is not registered; "
            "run `dvc repro`"
        )
    client = model_versions.client()
    parent, file = get_or_create.active_run_id(client, registered.version), layout.offload_record(device)
    identity = {MLFLOW_PARENT_RUN_ID: parent, DIGEST_TAG: file_sha256(file)}
    times = times_of(file)
    start_ms, end_ms = (int(1000 * times.started_s), int(1000 * times.ended_s)) if times else (None, None)
    experiment = client.get_run(parent).info.experiment_id
    run = get_or_create.find_or_create_run(client, experiment, f"offload {device}", identity, start_ms=start_ms)
    if run.info.status != "FINISHED":  # also if an earlier call was interrupted
        _fill(client, run.info.run_id, device, record, end_ms)
    write_json(layout.logged(device), registered)


def _fill(client: MlflowClient, run_id: str, device: str, record: OffloadRecord, end_ms: int | None) -> None:
    settings = {"device": device, "edge": record.edge, "link": record.link, "questions": record.questions}
    model_versions.log_run(client, run_id, settings, offloading_metrics(device, record), {}, {})
    client.log_artifact(run_id, str(layout.offload_record(device)))
    client.set_terminated(run_id, end_time=end_ms)
