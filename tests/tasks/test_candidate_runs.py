"""The runs of candidates in MLflow: nested as the candidates are, with the times of their stages."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys

import grimp
import pytest

from tasks import layout
from tasks.log import log
from tasks.process.stage_times import note_times, times_of
from tasks.registry import model_folder, model_versions
from tests import results
from tests.tasks.conftest import PROJECT
from tests.tasks.test_promotion import EVEN, Project

# MLflow, SQLAlchemy and pandas emit warnings about their own code.
pytestmark = pytest.mark.filterwarnings("default")
BEGUN_S, ENDED_S = 1_700_000_000.0, 1_700_000_600.5
# Imported only to make models, not to open them.
NOT_NEEDED = {"gptqmodel"}


@pytest.fixture(scope="module")
def project(tiny_params, checkpoint, tmp_path_factory):
    with contextlib.chdir(tmp_path_factory.mktemp("project")), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Project(tiny_params, checkpoint)


@pytest.fixture(scope="module")
def runs(project):
    """The runs of one registration, by candidate; the times of `a` are known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_folder, "add_model", lambda *_: None)  # takes a second each
        project.register = lambda: None
        project.evaluate(EVEN)
        del project.register
        layout.cost("a").write_text(json.dumps({"seconds": 2.0, "cpu_seconds": 1.0, "peak_rss_bytes": 1}))
        note_times("compress", "a", BEGUN_S, BEGUN_S + 300)
        note_times("evaluate", "a", BEGUN_S + 400, ENDED_S)
        versions = project.register()
    store = model_versions.client()
    return {
        name: store.get_run(store.get_model_version("lilliput", version).run_id) for name, version in versions.items()
    }


def test_a_run_is_nested_in_that_of_its_parent(runs):
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    base = runs["base"].info.run_id
    assert parents == {"base": None, "a": base, "b": base}


def test_a_run_has_the_times_of_its_stages(runs):
    assert (runs["a"].info.start_time, runs["a"].info.end_time) == (1000 * BEGUN_S, 1000 * ENDED_S)
    assert runs["b"].info.start_time > 1000 * ENDED_S  # made elsewhere: the time of the registration


def test_times_belong_to_the_bytes_of_a_record(runs):
    record = layout.cost("a")
    times = times_of(record)
    assert times is not None and times.started_s == BEGUN_S
    text = record.read_text()
    record.write_text(f"{text} ")
    assert times_of(record) is None
    record.write_text(text)
    assert times_of(record) == times
    note_times("register", "a", 0.0, 1.0)  # has no record


def test_offloading_is_a_run_in_that_of_the_champion(runs, project):
    policies = {"device": results.policy(0.8, None, 4.0, p50=90.0, p90=95.0)}
    write = layout.offload_record("laptop")
    write.parent.mkdir(exist_ok=True)
    record = results.offload_record("a", {"wifi": policies, "3g": {}})
    write.write_text(json.dumps(record.as_json()))
    for _ in range(2):  # idempotent
        log(project.params("laptop"), "laptop")
    store, parent = model_versions.client(), runs["a"].info
    (child,) = store.search_runs([parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert (child.info.run_name, child.info.status) == ("offload laptop", "FINISHED")
    assert child.data.metrics["offload/laptop/device/accuracy"] == 0.8
    assert (child.data.params["device"], child.data.params["link"]) == ("laptop", record.link)
    assert [artifact.path for artifact in store.list_artifacts(child.info.run_id)] == ["laptop.json"]
    assert not any(name.startswith("offload") for name in store.get_run(parent.run_id).data.metrics)


LOAD = """
import sys
sys.path[:] = [path for path in sys.path if path not in {removed!r}]
import mlflow
import importlib.util
assert importlib.util.find_spec("tasks") is None, "the checkout is reachable"
model = mlflow.pyfunc.load_model({folder!r})
print("ANSWER", model.predict(model.input_example))
import lilliput
print("LIBRARY", lilliput.__file__)
"""


def test_a_copied_version_opens_without_store_and_checkout(project, tmp_path):
    """As on another machine: only the folder of the version, in a process that finds no checkout."""
    version = project.evaluate(EVEN)["base"]
    run_id = model_versions.client().get_model_version("lilliput", version).run_id
    folder = tmp_path / "copied"
    shutil.copytree(layout.MLRUNS / "artifacts" / run_id / "artifacts" / "model", folder)
    code = LOAD.format(removed=[str(PROJECT)], folder=str(folder))
    # -S leaves out the editable installation; -I the working directory and PYTHONPATH.
    code = f"import sys; sys.path.append({str(site_packages())!r})\n{code}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"ANSWER \[.*\]", done.stdout)
    assert f"LIBRARY {folder}/code/lilliput/__init__.py" in done.stdout
    assert not [*folder.rglob("*.pkl"), *folder.rglob("__pycache__/tasks*")]


def site_packages():
    import mlflow

    return mlflow.__path__[0].removesuffix("/mlflow")


def test_the_requirements_of_a_version_have_what_opening_it_imports():
    graph = grimp.build_graph("lilliput", include_external_packages=True, cache_dir=None)
    opening = ("lilliput.models", "lilliput.runtime.torch", "lilliput.runtime.compiled", "lilliput.chat.template")
    imported = {name.partition(".")[0] for module in opening for name in graph.find_upstream_modules(module)}
    needed = imported - {"lilliput"} - NOT_NEEDED - set(sys.stdlib_module_names)
    required = {name.replace("-", "_").partition(".")[0] for name in model_folder.REQUIREMENTS}
    assert needed <= required
