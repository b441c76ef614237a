"""Versions in the registry: what registering and promoting ask of MLflow."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.scaling.measuring import Counts, Row, tell
from tasks.process.cost import cpu_s


def registry(versions: Counts = None) -> None:
    """What registering and promoting ask of MLflow, by the number of versions there are."""
    for number in versions or [100, 1_000, 10_000]:
        with tempfile.TemporaryDirectory() as folder:
            tell("registry", {"versions": number}, _registry, Path(folder), number)


def _registry(folder: Path, count: int) -> Row:
    """CPU-milliseconds of what `register` and `promote` ask of MLflow's SQLite store when it holds `count` versions."""
    from tasks.registry import get_or_create, model_folder, model_versions, version_records

    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with contextlib.chdir(folder):
        client = model_versions.client()
        experiment = get_or_create.experiment_id(client)
        get_or_create.ensure_model(client)
        run = client.create_run(experiment).info.run_id
        client.create_model_version(
            model_versions.MODEL, source=model_folder.model_uri(client, run), run_id=run, tags=_tags(1)
        )
        _multiply_versions(Path("mlruns/mlflow.db"), count)
        model_versions.move_champion("phone", str(count // 2))

        def one_more() -> None:
            run_id = client.create_run(experiment).info.run_id
            model_versions.log_run(client, run_id, {"lora.rank": 8}, {"accuracy_choice": 0.5}, {"loss": [(1, 2.0)]}, {})
            source = model_folder.model_uri(client, run_id)
            client.create_model_version(model_versions.MODEL, source=source, run_id=run_id, tags=_tags(0))

        steps: dict[str, Callable[[], object]] = {
            "ensure_model": lambda: get_or_create.ensure_model(client),
            "find_version": lambda: get_or_create.find_version(client, _tags(count // 3)["lilliput.evaluation_sha256"]),
            "find_none": lambda: get_or_create.find_version(client, "none"),
            "log_and_create_version": one_more,
            "version_of_alias": lambda: model_versions.version_of("champion-phone"),
            "tell": lambda: version_records.update_role(str(count // 2), "phone", refused=f"{time.time_ns()}"),
            "forget_devices": lambda: model_versions.forget_devices(["phone"]),
        }
        return {f"{name}_cpu_ms": _milliseconds(step) for name, step in steps.items()}


def _tags(number: int) -> dict[str, str]:
    """As many tags, as long, as `register` gives a version."""
    names = {"candidate": "pocket", "strategy": "gptq", "parent": "distilled"}
    digests = {name: f"{name} {number:050d}" for name in ("evaluation_sha256", "artifact_sha256")}
    return {f"lilliput.{name}": value for name, value in (names | digests).items()}


def _multiply_versions(database: Path, count: int) -> None:
    """Copies of version 1 by SQL, because MLflow's own way takes a quarter of an hour for ten thousand."""
    with sqlite3.connect(database) as store:
        for table in ("model_versions", "model_version_tags"):
            columns = [row[1] for row in store.execute(f"pragma table_info({table})")]
            rows = store.execute(f"select {', '.join(columns)} from {table}").fetchall()
            more = (_copy(dict(zip(columns, row, strict=True)), n) for n in range(2, count + 1) for row in rows)
            marks = ", ".join("?" * len(columns))
            store.executemany(f"insert into {table} values ({marks})", more)
    store.close()


def _copy(row: Row, number: int) -> list[object]:
    value = {"value": _tags(number).get(row["key"])} if "key" in row else {}
    return list((row | {"version": number} | value).values())


def _milliseconds(step: Callable[[], object], times: int = 5) -> float:
    """The median of five, after one that warms up."""
    step()
    return 1e3 * statistics.median(_cpu_of(step) for _ in range(times))


def _cpu_of(step: Callable[[], object]) -> float:
    before = cpu_s()
    step()
    return cpu_s() - before
