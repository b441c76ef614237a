"""`--plan` and a run read the source before anything else, and print what was found."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from flows import democratize
from flows.engine import workspace
from lilliput.errors import DataError
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
    monkeypatch.setattr("flows.democratize.print_plan", lambda planned: print("Plan"))
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


def test_a_workspace_gets_folders_whole_and_a_file_for_a_dataset_of_the_hub(tmp_path, monkeypatch):
    project, chats = tmp_path / "project", tmp_path / "mine/chats"
    for name in ("lilliput", "tasks", "corpora"):
        (project / name).mkdir(parents=True)
    for name in ("dvc.yaml", ".dvcignore"):
        (project / name).write_text("")
    chats.mkdir(parents=True)
    (chats / "a.jsonl").write_text(json.dumps(ROW) + "\n")
    monkeypatch.setattr(workspace, "PROJECT", project)
    text = (tmp_path / "mine/tiny.yaml", (workspace.Path(__file__).parents[2] / "examples/tiny.yaml").read_text())
    text[0].write_text(text[1].replace("corpora/world-facts.yaml", "chats"))
    folder = workspace.open_workspace(text[0])
    assert (folder / "chats/a.jsonl").read_text() == json.dumps(ROW) + "\n"
    (chats / "a.jsonl").rename(chats / "b.jsonl")
    workspace.open_workspace(text[0])
    assert [path.name for path in (folder / "chats").iterdir()] == ["b.jsonl"]
    source = f"hub:org/chats@{COMMIT}?split=train"
    text[0].write_text(text[1].replace("corpora/world-facts.yaml", source))
    workspace.open_workspace(text[0])
    assert (folder / source).read_text() == f"{source}\n"
