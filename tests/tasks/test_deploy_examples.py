"""A deployment takes recorded answers and the chosen policies only of exactly its pair of models."""

from __future__ import annotations

import json

import pytest

from lilliput.data.questions import Question
from lilliput.errors import ArtifactError
from lilliput.records import OffloadRecord
from tasks import deploy, layout
from tests.conftest import PROJECT
from tests.offload.test_choice import chosen

ROW = {
    "id": "capital/Peru",
    "question": "What is the capital of Peru?",
    "answerable": True,
    "device": {"text": "Lima", "right": True, "abstained": False, "logprobs": [-0.1]},
    "server": {"text": "Lima", "right": True, "abstained": False, "logprobs": []},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = layout.offload("phone-4gb") / deploy.ANSWERS
    answers.parent.mkdir(parents=True)
    answers.write_text(json.dumps(ROW) + "\n")
    committed = (PROJECT / "offload" / "phone-4gb.json").read_text()
    layout.offload_record("phone-4gb").write_text(committed)
    question = Question(id=ROW["id"], question=ROW["question"], answer="Lima", group="g").model_dump_json()
    layout.DATA.mkdir()
    for name in ("train", "calibration", "questions"):
        (layout.DATA / f"{name}.jsonl").write_text(question + "\n")
    return OffloadRecord.model_validate_json(committed).pair


def test_answers_of_this_pair_are_taken(folder):
    assert [one.answer for one in deploy._recorded("phone-4gb", folder)] == ["Lima"]


def test_answers_of_another_pair_or_without_their_files_are_not(folder, tmp_path):
    assert deploy._recorded("phone-4gb", (folder[0], "another")) == ()
    assert deploy._recorded("laptop", folder) == ()
    (tmp_path / layout.offload("phone-4gb") / deploy.ANSWERS).unlink()
    assert deploy._recorded("phone-4gb", folder) == ()


def record_with(choices):
    """The committed record with these choices; None for a record of an older version."""
    record = json.loads((PROJECT / "offload" / "phone-4gb.json").read_text())
    record.pop("choices", None)
    layout.offload_record("phone-4gb").write_text(json.dumps(record | ({"choices": choices} if choices else {})))


def test_choices_of_this_pair_are_taken(folder):
    choices = {"wifi": chosen("threshold")}
    record_with({link: choice.as_json() for link, choice in choices.items()})
    assert deploy._choices("phone-4gb", folder) == choices
    with pytest.raises(ArtifactError, match="measured with another pair of models; run the stage `offload`"):
        deploy._choices("phone-4gb", (folder[0], "another"))


def test_a_record_of_an_older_version_names_the_remedy(folder):
    record_with(None)
    with pytest.raises(
        ArtifactError, match="lacks `choices`, because an older version wrote it; run the stage `offload`"
    ):
        deploy._choices("phone-4gb", folder)
    with pytest.raises(ArtifactError, match="no such file, so no policy is chosen yet"):
        deploy._choices("laptop", folder)
