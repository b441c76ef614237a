"""A project of the user's own: made by `lilliput init`, run outside the clone, stale by the digests of the code."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.engine.folders import SETTINGS, folder_of, portable
from flows.engine.lineage import Lineage
from flows.engine.own_project import without_code
from flows.engine.workspace import open_workspace
from flows.init import initialise
from lilliput.config import StrategiesConfig
from lilliput.errors import ConfigError
from tasks.process.code_digests import DIGESTS, digests, key_of, require_same_code
from tests.flows.conftest import PROJECT

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # from pygtrie to DVC
CHOICES = {"item.apply": list(StrategiesConfig.model_fields), "item.target": ["gguf", "onnx", "autogptq"]}
TINY = """\
data: {source: questions.jsonl, calibration_examples: 8, choice_questions: 24, unanswerable_questions: 6}
candidates:
  base: {from: source, apply: load}
  small: {from: base, apply: rtn}
device: phone-4gb
strategies:
  load: {rehearsal: {layers: 2, hidden_size: 64, heads: 4, kv_heads: 2, intermediate_size: 128}}
parity: {tokens: 64, questions: 6, same_argmax: 0.5}
evaluation: {free_questions: 8, max_new_tokens: 4, timed_queries: 3, query_tokens: 8, resamples: 200, batch_size: 16}
promotion: {phone-4gb: {max_accuracy_drop: 0.9, max_hallucination_rise: 0.9}}
"""


@pytest.fixture
def project(tmp_path) -> Path:
    folder = tmp_path / "mine"
    initialise(folder)
    return folder


def node(tree, key):
    for part in key.split("."):
        tree = tree[part]
    return tree


def chosen(key: str) -> list[str]:
    """`key` for each strategy or target that it stands for."""
    for field, values in CHOICES.items():
        if f"${{{field}}}" in key:
            return [key.replace(f"${{{field}}}", value) for value in values]
    return [key]


def pipeline():
    return YAML(typ="safe").load((PROJECT / "dvc.yaml").read_text())


def dependencies(stages, name) -> list[str]:
    return stages[name].get("do", stages[name])["deps"]


def test_every_dependency_on_code_is_a_digest_and_no_other_one_is_lost():
    before, after = pipeline()["stages"], without_code(pipeline())["stages"]
    known = digests()
    compared = 0
    for name in before:
        code = [dep for dep in dependencies(before, name) if dep.startswith(("lilliput/", "tasks/"))]
        assert dependencies(after, name) == [dep for dep in dependencies(before, name) if dep not in code]
        stage = after[name].get("do", after[name])
        (keys,) = (entry[str(DIGESTS)] for entry in stage["params"] if isinstance(entry, dict))
        assert keys == [key_of(dep) for dep in code]
        for key in keys:
            assert all(node(known, exact) for exact in chosen(key))
            compared += len(chosen(key))
    assert compared > 200


def test_a_digest_changes_with_its_file_alone(tmp_path):
    for name in ("lilliput/a.py", "lilliput/b/c.py", "lilliput/b/c.html", "tasks/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    before = digests(tmp_path)
    (tmp_path / "lilliput/b/__pycache__").mkdir()
    (tmp_path / "lilliput/b/__pycache__/c.pyc").write_text("x")
    assert digests(tmp_path) == before
    (tmp_path / "lilliput/b/c.html").write_text("changed")
    after = digests(tmp_path)
    assert after["lilliput"]["b"]["c"] != before["lilliput"]["b"]["c"]
    assert after["lilliput"]["a"] == before["lilliput"]["a"]
    assert after["tasks"] == before["tasks"]


def test_a_new_project_has_all_files_and_names_what_was_done(tmp_path, capfd):
    done = initialise(tmp_path / "a" / "mine")
    folder = tmp_path / "a" / "mine"
    assert not capfd.readouterr().out  # neither git nor DVC writes between the lines of the command
    assert {path.name for path in folder.iterdir()} >= {SETTINGS, "questions.jsonl", "dvc.yaml", ".dvc", ".gitignore"}
    assert (folder / ".git").is_dir()
    assert any(line.startswith("git: a new repository") for line in done)
    ignored = ["git", "check-ignore", "models/x", "data/train.jsonl", "bundles/x", "mlruns/x", ".democratize.lock"]
    assert len(subprocess.run(ignored, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()) == 5
    kept = ["git", "check-ignore", "params.yaml", "metrics/base.json", "dvc.lock", str(DIGESTS), "questions.jsonl"]
    assert subprocess.run(kept, cwd=folder, capture_output=True, check=False).stdout == b""


def test_a_project_inside_a_repository_of_git_gets_none_of_its_own(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    done = initialise(tmp_path / "mine")
    assert not (tmp_path / "mine" / ".git").exists()
    assert not any(line.startswith("git") for line in done)
    assert (tmp_path / "mine" / ".dvc" / "config").exists()


def test_files_of_the_user_are_kept(tmp_path):
    (tmp_path / "questions.jsonl").write_text((PROJECT / "examples/questions.jsonl").read_text() + "\n")
    (tmp_path / ".gitignore").write_text("mine\n")
    initialise(tmp_path)
    assert (tmp_path / "questions.jsonl").read_text().endswith("\n\n")
    assert (tmp_path / ".gitignore").read_text() == "mine\n"
    with pytest.raises(ConfigError, match=r"lilliput\.yaml: exists already"):
        initialise(tmp_path)


def test_the_clone_is_no_project_of_a_user(tmp_path):
    with pytest.raises(ConfigError, match=r"has a pipeline already"):
        initialise(PROJECT)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        initialise(tmp_path / "file")


def test_the_settings_file_is_found_from_its_folder(project, monkeypatch):
    monkeypatch.chdir(project)
    assert folder_of(Path("params.yaml")) == folder_of(Path(SETTINGS)) == project
    assert portable(Path("params.yaml")) == str(project / SETTINGS)
    monkeypatch.chdir(PROJECT)
    assert portable(Path("examples/tiny.yaml")) == "examples/tiny.yaml"


def test_a_search_has_a_workspace_inside_the_project(project):
    folder = open_workspace(project / SETTINGS, "search")
    assert folder == project / "workspaces" / "lilliput.search"
    assert (folder / "tasks/__main__.py").exists()
    assert (folder / "questions.jsonl").exists()
    assert YAML(typ="safe").load((folder / "params.yaml").read_text())["candidates"].keys() >= {"base", "pocket"}


def test_a_project_inside_the_clone_has_a_repository_of_its_own(tmp_path):
    from dvc.repo import Repo

    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    Repo.init(str(tmp_path)).close()
    initialise(tmp_path / "mine")
    with contextlib.chdir(tmp_path / "mine"), closing(Lineage(tmp_path / "mine")) as lineage:
        assert "compress@pocket" in [stage.name for stage in lineage.stages()]
    with closing(Repo(str(tmp_path))) as outer:
        assert not outer.index.stages


def test_stages_are_stale_by_their_own_code_and_by_effective_settings(project):
    def changes(stage):
        with contextlib.chdir(project), closing(Lineage(project)) as lineage:
            return lineage.changes(stage)

    with contextlib.chdir(project), closing(Lineage(project)) as lineage:
        assert not lineage.is_recorded("source")
        (project / "models/source").mkdir(parents=True)
        (project / "models/source/file").write_text("x")
        lineage.commit("source", lineage.inputs("source"))
        assert lineage.is_recorded("source")
    assert changes("source") == []
    yaml, file = YAML(), project / DIGESTS
    known = yaml.load(file.read_text())
    for module, expected in (("serve", []), ("source", [f"{DIGESTS}: lilliput.source modified"])):
        changed = yaml.load(file.read_text())
        changed["lilliput"][module] = "0" * 16
        with file.open("w") as stream:
            yaml.dump(changed, stream)
        assert changes("source") == expected
    with file.open("w") as stream:
        yaml.dump(known, stream)
    (project / SETTINGS).write_text("source: {model: 'path:/elsewhere'}\ndata: {source: questions.jsonl}\n")
    open_workspace(project / SETTINGS)
    assert changes("source") == ["params.yaml: source modified"]


def test_a_stage_of_other_code_is_refused_until_a_plan_was_made(project):
    require_same_code(project)
    require_same_code(project.parent)  # not a project of this kind
    text = (project / DIGESTS).read_text()
    (project / DIGESTS).write_text(text.replace("source: ", "source: 0", 1))
    with pytest.raises(ConfigError, match=r"another version of Lilliput.*run `lilliput plan`"):
        require_same_code(project)
    open_workspace(project / SETTINGS)
    require_same_code(project)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_project_runs_from_its_settings_to_a_bundle(tokenizer, project):
    del tokenizer  # skips if the wheels are not available
    (project / SETTINGS).write_text(TINY)
    environment = os.environ | {"LILLIPUT_SHARE_MACHINE": "1", "PYTHONPATH": str(PROJECT)}

    def lilliput(*arguments):
        command = [sys.executable, "-m", "flows", *arguments]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    lilliput("run")
    assert (project / "bundles/phone-4gb/README.md").exists()
    assert (project / "report/index.html").exists()
    assert {stage["reason"] for stage in json.loads(lilliput("plan", "--json"))["stages"]} == {None}
