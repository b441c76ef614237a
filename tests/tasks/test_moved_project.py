"""A moved or copied project works in its new folder and does not touch the old one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from ruamel.yaml import YAML

from lilliput.artifacts import write_json
from lilliput.chat.template import encode_prompt
from lilliput.errors import ArtifactError, RegistryError
from lilliput.runtime.torch import TorchRuntime
from scripts.services import Ports, Services, _running_processes
from tasks import layout
from tasks.promote import promote
from tasks.registry import model_versions, moved
from tests.tasks.test_promotion import EVEN, Project

# MLflow, SQLAlchemy and pandas emit warnings about their own code.
pytestmark = pytest.mark.filterwarnings("default")
QUESTION = "What is the capital of Peru?"
CHAMPION = "models:/lilliput@champion-laptop"
BASE_WINS = EVEN | {"base": 150}  # the only candidate that is a real model
_OPENED: list[str] = []
sys.addaudithook(lambda event, arguments: _OPENED.append(str(arguments[0])) if event in _OPENING else None)
_OPENING = ("open", "sqlite3.connect")


@pytest.fixture(scope="module")
def first(tiny_params, checkpoint, tmp_path_factory):
    """A project with a champion, in a folder whose name has to be escaped in an address."""
    folder = tmp_path_factory.mktemp("first place", numbered=False) / "my project"
    folder.mkdir()
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        project = Project(tiny_params, checkpoint)
        versions = project.evaluate(BASE_WINS)
        promote(project.params("laptop"))
        _make_older(model_versions.client(), versions["a"])
    return project, folder


def _make_older(client, version):
    """Gives one version the absolute paths that earlier versions of Lilliput wrote."""
    run_id = client.get_model_version("lilliput", version).run_id
    for tag, folder in {"lilliput.artifact": layout.model("a"), "lilliput.compiled.gguf": Path("compiled/a")}.items():
        client.set_model_version_tag("lilliput", version, tag, folder.absolute().as_uri())
    client.set_tag(run_id, "lilliput.artifact", layout.model("a").absolute().as_uri())
    path = layout.MLRUNS / "artifacts" / run_id / "artifacts/model/MLmodel"
    content = YAML().load(path)
    content["flavors"]["python_function"]["config"]["project"] = str(Path.cwd())
    YAML().dump(content, path)


@pytest.fixture
def elsewhere(first, tmp_path, monkeypatch):
    """The working directory is a copy of the project."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "second place" / "project"
    shutil.copytree(first[1], folder)
    monkeypatch.chdir(folder)
    return folder


def _state(folder: Path) -> dict[str, tuple[int, str]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


def _mentioning(text: str, folder: Path) -> list[str]:
    forms = {text.encode(), Path(text).as_uri().encode()}
    files = (path for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in files if any(form in path.read_bytes() for form in forms)]


def _expected(project, opened):
    prompt = encode_prompt(opened[1], project._params.data.system_prompt, QUESTION)
    return TorchRuntime(*opened, batch_size=1).generate([prompt], project._params.evaluation.max_new_tokens)


def test_a_copied_project_registers_promotes_and_answers_without_reading_the_old_folder(
    first, elsewhere, opened, tmp_path, monkeypatch, capsys
):
    project, old = first
    before = _state(old)
    _OPENED.clear()
    versions = project.evaluate(BASE_WINS | {"a": 121})  # a new version, whose run has files
    promote(project.params("laptop", max_accuracy_drop=0.06))
    monkeypatch.chdir(tmp_path)
    assert mlflow.pyfunc.load_model(CHAMPION).predict([QUESTION]) == _expected(project, opened)
    assert not [path for path in _OPENED if path.startswith(str(old))]
    assert _state(old) == before
    run = model_versions.MlflowClient().get_run(
        model_versions.MlflowClient().get_model_version("lilliput", versions["a"]).run_id
    )
    assert run.info.artifact_uri.startswith(f"{elsewhere.as_uri()}/mlruns/artifacts/")
    assert capsys.readouterr().err.count(f"MLflow's store was moved from {old}/mlruns to {elsewhere}/mlruns") == 1


def test_no_file_of_a_moved_project_contains_its_old_path(first, elsewhere, capsys):
    _, old = first
    assert _mentioning(str(old), elsewhere)
    moved.update_paths()
    assert "paths updated" in capsys.readouterr().err
    with contextlib.closing(moved.sqlite3.connect("mlruns/mlflow.db")) as database:
        database.execute("VACUUM")  # pages that SQLite no longer uses keep their bytes
    assert _mentioning(str(old), elsewhere) == []
    moved.update_paths()
    assert capsys.readouterr().err == ""


def test_a_champion_opens_after_the_original_was_removed(first, elsewhere, opened, tmp_path, monkeypatch):
    project, _ = first
    third = tmp_path / "third"
    moved.update_paths()
    shutil.move(elsewhere, third)
    monkeypatch.chdir(third)
    model_versions.client()
    monkeypatch.chdir(tmp_path)
    assert mlflow.pyfunc.load_model(CHAMPION).predict([QUESTION]) == _expected(project, opened)


def test_weights_come_from_the_copy_even_before_its_paths_are_updated(first, elsewhere, opened, tmp_path, monkeypatch):
    project, old = first
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{elsewhere}/mlruns/mlflow.db")
    _OPENED.clear()
    assert mlflow.pyfunc.load_model(CHAMPION).predict([QUESTION]) == _expected(project, opened)
    assert not [path for path in _OPENED if path.startswith(str(old)) and "/form/" in path]


def test_a_store_that_cannot_be_updated_after_a_move_is_one_clear_error(first, elsewhere, monkeypatch):
    monkeypatch.setattr(moved, "_TIMEOUT_S", 0.1)
    with contextlib.closing(moved.sqlite3.connect("mlruns/mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RegistryError, match=r"was moved here from .*my project/mlruns, .*database is locked"):
            moved.update_paths()
    moved.update_paths()


def test_a_location_that_a_user_chose_is_kept(first, elsewhere, capsys):
    moved.update_paths()
    with contextlib.closing(moved.sqlite3.connect("mlruns/mlflow.db")) as database, database:
        database.execute("UPDATE experiments SET artifact_location = 'file:///srv/experiments/artifacts'")
    shutil.move("mlruns", "store")  # a database that MLFLOW_TRACKING_URI names
    shutil.rmtree("store/artifacts")
    capsys.readouterr()
    moved.update_paths(Path("store/mlflow.db"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("own", [True, False], ids=["own", "copied"])
def test_the_gateway_of_the_original_project_does_not_belong_to_the_copy(tmp_path, own):
    from flows import deploy

    home = tmp_path / "deployments/laptop"
    home.mkdir(parents=True)
    command = [sys.executable, "-c", "import time; time.sleep(60)", "lilliput.serve", str(home)]
    with subprocess.Popen(command, cwd=deploy.PROJECT if own else tmp_path) as gateway:
        known = {"pid": gateway.pid, "url": "http://127.0.0.1:9"}
        write_json(home / deploy.GATEWAY, known)
        try:
            assert deploy.running(home) == (known if own else None)
        finally:
            gateway.kill()


def test_services_belong_to_their_moved_folder_and_not_to_a_copy(tmp_path):
    first, copy, later = (tmp_path / name for name in ("first", "copy", "later"))
    first.mkdir()
    Services(first, Ports(1, 2, 3, 4), "postgres")._record_processes()
    shutil.copytree(first, copy)
    assert [process.pid for process in _running_processes(first)] == [os.getpid()]
    assert _running_processes(copy) == []
    first.rename(later)
    assert [process.pid for process in _running_processes(later)] == [os.getpid()]


def test_a_gateway_that_was_moved_while_running_names_the_remedy(tmp_path):
    from flows import deploy

    home, python = tmp_path / "deployments/laptop", tmp_path / "python"
    home.mkdir(parents=True)
    python.symlink_to(sys.executable)
    command = [python, "-c", "import time; time.sleep(60)", "lilliput.serve", "deployments/laptop"]
    with subprocess.Popen(command, cwd=deploy.PROJECT) as gateway:
        write_json(home / deploy.GATEWAY, {"pid": gateway.pid, "url": "http://127.0.0.1:9"})
        try:
            python.unlink()
            with pytest.raises(ArtifactError, match=r"started before its project was moved.*--stop"):
                deploy._take_over(home, deploy.running(home))
        finally:
            gateway.kill()
