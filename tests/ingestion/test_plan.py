"""`--plan` and a run read the source before anything else, and print what was found."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from flows import democratize
from flows.engine import workspace
from lilliput.errors import ConfigError, DataError
from tests.ingestion.hub import COMMIT

ROW = {"instruction": "Add 2 and 2.", "output": "4"}


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """A folder with params.yaml in which the stage `data` is not up to date."""
    text = (workspace.PROJECT / "examples/tiny.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("corpora/world-facts.yaml", "chats.jsonl"))
    lineage = SimpleNamespace(changes=lambda name: ["changed"] if name == "data" else [], close=lambda: None)
    monkeypatch.setattr("flows.engine.lineage.Lineage", lambda folder: lineage)
    monkeypatch.setattr("flows.engine.plan.plan", lambda *_: [])
    monkeypatch.setattr("flows.engine.plan.known_model", lambda *_: None)
    monkeypatch.setattr("flows.engine.plan_output.print_plan", lambda planned, fits, rows, as_json: print(rows, "Plan"))
    return tmp_path


def write(folder, *rows):
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_plan_reports_what_is_in_the_source(planned, capsys):
    write(planned, ROW, ROW | {"output": ""})
    democratize._print_plan(planned, [])
    assert (
        "chats.jsonl: Alpaca rows, 2; 1 row without an answer skipped (first: chats.jsonl:2)" in capsys.readouterr().out
    )


def test_the_plan_lists_every_mistake(planned):
    write(planned, ROW, {"text": "a"}, ROW, {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match=r"chats\.jsonl:2: no known format.*\nchats\.jsonl:4: a prompt/completion row"):
        democratize._print_plan(planned, [])


def test_a_run_rejects_mistakes_before_its_first_stage(planned, monkeypatch):
    write(planned, ROW, {"text": "a"})
    monkeypatch.chdir(planned)
    monkeypatch.setattr("flows.democratize.update_paths", lambda: None)
    (planned / "dvc.yaml").write_text("stages: {}\n")
    with pytest.raises(DataError, match=r"chats\.jsonl:2: no known format"):
        democratize._run_all(planned, [], SimpleNamespace())


@pytest.fixture
def params_with(tmp_path, monkeypatch):
    """Returns a function that writes params.yaml with replacements, for a project in which nothing ran."""
    text, project = (workspace.PROJECT / "examples/tiny.yaml").read_text(), tmp_path / "project"
    for name in ("lilliput", "tasks", "corpora", "chat_templates"):
        (project / name).mkdir(parents=True)
    for name in ("dvc.yaml", ".dvcignore"):
        (project / name).write_text("")
    monkeypatch.setattr(workspace, "PROJECT", project)

    def write(source, **replacements):
        path = tmp_path / "mine/tiny.yaml"
        path.parent.mkdir(exist_ok=True)
        changed = text.replace("corpora/world-facts.yaml", source)
        for key, value in replacements.items():
            changed = changed.replace(f"{key}: {{}}", f"{key}: {value}")
        path.write_text(changed)
        return path

    return write


def test_a_workspace_gets_folders_whole_and_a_file_for_a_dataset_of_the_hub(params_with, tmp_path):
    chats = tmp_path / "mine/chats"
    chats.mkdir(parents=True)
    (chats / "a.jsonl").write_text(json.dumps(ROW) + "\n")
    folder = workspace.open_workspace(params_with("chats"))
    assert (folder / "chats/a.jsonl").read_text() == json.dumps(ROW) + "\n"
    (chats / "a.jsonl").rename(chats / "b.jsonl")
    workspace.open_workspace(params_with("chats"))
    assert [path.name for path in (folder / "chats").iterdir()] == ["b.jsonl"]
    source = f"hub:org/chats@{COMMIT}?split=train"
    workspace.open_workspace(params_with(source))
    assert (folder / source).read_text() == f"{source}\n"


def test_a_workspace_gets_the_prompts_of_a_teacher_before_its_answers_exist(params_with, tmp_path):
    teachers = '{answers: {prompts: asked.jsonl, url: "http://x", model: m, most_prompts: 1, minutes: 1.0}}'
    params = params_with("synthetic/answers/rows.jsonl", synthesise=teachers)
    with pytest.raises(DataError, match=r"synthesise\.answers\.prompts: no such file: asked\.jsonl"):
        workspace.open_workspace(params)
    (tmp_path / "mine/asked.jsonl").write_text('{"prompt": "Hi"}\n')
    folder = workspace.open_workspace(params)
    assert (folder / "asked.jsonl").read_text() == '{"prompt": "Hi"}\n'
    assert not (folder / "synthetic").exists()
    with pytest.raises(DataError, match=r"data\.source: no such file: synthetic/others/rows\.jsonl"):
        workspace.open_workspace(params_with("synthetic/others/rows.jsonl", synthesise=teachers))


@pytest.mark.parametrize("source", ["../chats", "chats/.."])
def test_a_workspace_never_replaces_what_is_outside_of_it(params_with, tmp_path, source):
    for folder in ("chats", "mine/chats", "project/workspaces/chats"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jsonl").write_text(json.dumps(ROW) + "\n")
    before = sorted(tmp_path.rglob("*.jsonl"))
    with pytest.raises(ConfigError, match="is outside of the project; write its absolute path"):
        workspace.open_workspace(params_with(source))
    assert sorted(tmp_path.rglob("*.jsonl")) == before
