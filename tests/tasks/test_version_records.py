"""A version has few tags; the rest is in records among the artifacts of its run. Versions of earlier Lilliputs too."""

from __future__ import annotations

import contextlib
import json

import pytest

from lilliput.errors import ArtifactError
from tasks import layout
from tasks.promote import promote, roll_back
from tasks.registry import model_folder, model_versions, version_records
from tasks.registry.past_champion import measurement_conditions, read_past_champion
from tests.tasks.test_promotion import EVEN, Project

# MLflow, SQLAlchemy and pandas emit warnings about their own code.
pytestmark = pytest.mark.filterwarnings("default")
MOST_TAGS = 6


@pytest.fixture
def project(tiny_params, checkpoint, tmp_path):
    with contextlib.chdir(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(model_folder, "add_model", lambda *_: None)  # takes a second each
        yield Project(tiny_params, checkpoint)


def version_of(number):
    return model_versions.client().get_model_version("lilliput", number)


def file_of(number, name):
    return layout.MLRUNS / "artifacts" / version_of(number).run_id / "artifacts" / name


def test_a_version_has_at_most_six_tags_after_any_decision_and_is_found_by_them(project):
    versions, params = project.evaluate(EVEN), project.params("laptop", prefer="size")
    for device in ("a", "c", "laptop"):
        promote(project.params(device, prefer="size"))
    promote(project.params("laptop"))
    roll_back(project.params("laptop"), "laptop", "speaks in rhymes")
    promote(params)
    tags = {name: version_of(number).tags for name, number in versions.items()}
    assert {name: len(found) <= MOST_TAGS for name, found in tags.items()} == dict.fromkeys(versions, True), tags
    roles = version_records.read_roles(version_of(versions["b"]))
    assert roles.keys() == {"laptop", "a", "c"}
    assert roles["laptop"].vetoed and "speaks in rhymes" in roles["laptop"].vetoed.because
    client = model_versions.client()
    for name, value in {
        "candidate": "a",
        "strategy": "load",
        "artifact_sha256": tags["a"]["lilliput.artifact_sha256"],
    }.items():
        found = client.search_model_versions(f"name = 'lilliput' and tags.`lilliput.{name}` = '{value}'")
        assert versions["a"] in [str(version.version) for version in found], name
    (run,) = client.search_runs(
        [client.get_run(version_of(versions["a"]).run_id).info.experiment_id],
        "metrics.accuracy_choice = 0.6 and params.energy_source != 'unavailable'",
    )
    assert run.info.run_id == version_of(versions["a"]).run_id


def make_former(number, device_roles=None):
    """Gives a version the tags that earlier versions of Lilliput wrote, instead of records."""
    record = json.loads(file_of(number, "version.json").read_text())
    tags = {
        "accuracy_choice": "0.6000 [0.6000, 0.6000]",
        "energy_source": "estimate_tdp",
        "lilliput.parent_sha256": record["parent_sha256"],
        "lilliput.artifact": record["folder"],
        "lilliput.dvc": json.dumps(record["dvc"]),
        "lilliput.measured": json.dumps(record["measured"]),
        "lilliput.compiled.gguf": "compiled/a/gguf",
        "lilliput.compiled.gguf_sha256": "f" * 64,
    }
    for file in file_of(number, "roles").glob("*.json"):
        for kind, value in json.loads(file.read_text()).items():
            note = {"because": value["because"], "of": value["fingerprint"]} if isinstance(value, dict) else None
            if value is not None:
                tags[f"lilliput.{kind}.{file.stem}"] = json.dumps(note) if note else value
        file.unlink()
    file_of(number, "version.json").unlink()
    for name, value in tags.items():
        model_versions.client().set_model_version_tag("lilliput", number, name, value)


def test_versions_of_an_earlier_lilliput_are_read_promoted_and_moved_into_records(project):
    versions, params = project.evaluate(EVEN), project.params("laptop")
    promote(project.params("laptop", prefer="size"))
    promote(params)
    roll_back(params, "laptop", "speaks in rhymes")
    before = {
        number: (
            version_records.find_version_record(version_of(number)),
            version_records.read_roles(version_of(number)),
        )
        for number in versions.values()
    }
    decision = layout.PROMOTION.read_text()
    for number in versions.values():
        make_former(number)
    compiled = {"gguf": version_records.CompiledModel(folder="compiled/a/gguf", manifest_sha256="f" * 64)}
    for number, (record, roles) in before.items():
        expected = record.model_copy(update={"compiled": compiled})
        assert version_records.read_version_record(version_of(number)) == expected
        assert version_records.read_roles(version_of(number)) == roles
    assert len(version_of(versions["b"]).tags) > MOST_TAGS
    promote(params)
    promoted = json.loads(layout.PROMOTION.read_text())["laptop"]
    assert promoted["champion"] == json.loads(decision)["laptop"]["champion"] == "a"  # hold and veto are in force
    assert "speaks in rhymes" in promoted["refused"]["b"]
    assert project.register() == versions
    for number, (record, roles) in before.items():
        assert len(version_of(number).tags) <= MOST_TAGS
        assert version_records.read_version_record(version_of(number)).measured == record.measured
        assert version_records.read_roles(version_of(number))["laptop"].vetoed == roles["laptop"].vetoed
    assert read_past_champion(params, "laptop", version_of(versions["a"])).answers


def test_a_lost_record_is_named_with_its_remedy_which_works(project):
    versions, params = project.evaluate(EVEN), project.params("laptop")
    file_of(versions["a"], "version.json").unlink()
    with pytest.raises(
        ArtifactError, match=r"no version.json among the artifacts of its run; `dvc repro -f -s register"
    ):
        version_records.read_version_record(version_of(versions["a"]))
    project.register()
    assert version_records.read_version_record(version_of(versions["a"])).folder == "models/a"
    with pytest.raises(ArtifactError, match="does not say how it was measured"):
        read_past_champion(params, "laptop", version_of(versions["a"]))


@pytest.mark.parametrize("name", ["version.json", "roles/laptop.json"])
def test_a_damaged_record_is_named_with_its_remedy_which_works(project, name):
    versions, params = project.evaluate(EVEN), project.params("laptop")
    promote(params)
    damaged = file_of(versions["b"], name)
    damaged.write_text(damaged.read_text()[:-9])
    with pytest.raises(ArtifactError, match=rf"{name} of MLflow's run .*Invalid JSON.*remove this artifact, then run"):
        project.register() if name == "version.json" else promote(params)
    damaged.unlink()
    project.register()
    promote(params)
    assert damaged.exists()
    assert json.loads(layout.PROMOTION.read_text())["laptop"]["champion"] == "b"


def test_a_champion_without_a_run_is_replaced_and_cannot_be_restored(project, capsys):
    versions, params = project.evaluate(EVEN), project.params("laptop")
    promote(params)
    run_id, client = version_of(versions["b"]).run_id, model_versions.client()
    project.make("b", weights="1")
    project.evaluate(EVEN | {"b": 145})
    client.delete_run(run_id)
    client._tracking_client.store._hard_delete_run(run_id)  # as `mlflow gc` does
    promote(params)
    assert json.loads(layout.PROMOTION.read_text())["laptop"]["champion"] == "b"
    assert "has lost its run" in capsys.readouterr().err
    with pytest.raises(model_versions.RegistryError, match="removed permanently"):
        roll_back(params, "laptop", "")


def test_the_conditions_are_those_of_the_evaluation_not_of_a_later_registration(project):
    versions = project.evaluate(EVEN)
    before = version_records.read_version_record(version_of(versions["a"])).measured
    project.set_questions("other questions")
    assert project.register() == versions
    assert version_records.read_version_record(version_of(versions["a"])).measured == before
    assert before != measurement_conditions(project.params("laptop"))
