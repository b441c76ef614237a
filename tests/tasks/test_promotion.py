"""Promotion in an embedded MLflow store, with three candidates whose evaluations the tests set."""

import contextlib
import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from lilliput.artifacts import seal, write_json
from lilliput.chat.template import encode_prompt
from lilliput.config import CandidateConfig, PromotionConfig
from lilliput.errors import ArtifactError, ConfigError
from lilliput.runtime.torch import TorchRuntime
from tasks import layout
from tasks.promote import promote, proposals, roll_back
from tasks.register import register
from tasks.registry import model_versions, outbox
from tasks.registry.approvals import ApprovalAnswer
from tasks.registry.past_champion import read_past_champion
from tasks.registry.version_records import read_roles
from tests import results

# MLflow, SQLAlchemy and pandas emit warnings about their own code.
pytestmark = pytest.mark.filterwarnings("default")
QUESTIONS = 200
DEVICES = ["laptop", *"abcdefghijklmnopqr"]
SIZES = {"base": 300, "a": 100, "b": 200}
EVEN = {"base": 100, "a": 120, "b": 140}


class Project:
    """A folder with candidates `base`, `a` and `b`; each test promotes for its own device."""

    def __init__(self, params, checkpoint):
        specs = {"base": {"from": "source", "apply": "load"}}
        specs |= {name: {"from": "base", "apply": "gptq"} for name in ("a", "b")}
        candidates = {name: CandidateConfig.model_validate(spec) for name, spec in specs.items()}
        profile = params.devices["laptop"]
        devices = dict.fromkeys(DEVICES, profile)
        self._params = params.model_copy(
            update={"candidates": candidates, "compile": {}, "devices": devices, "promotion": {}}
        )
        for name in candidates:
            self.make(name, checkpoint if name == "base" else None)
        layout.PARAMS.write_text("candidates: …")
        self.set_questions("these questions")

    def params(self, device, **rules):
        rules = {"prefer": "accuracy", "max_accuracy_drop": 0.05, "max_hallucination_rise": 1.0} | rules
        return self._params.model_copy(update={"promotion": {device: PromotionConfig.model_validate(rules)}})

    def make(self, name, checkpoint=None, weights="0"):
        """Creates the artefact of `name` again."""
        folder = layout.model(name)
        shutil.rmtree(folder, ignore_errors=True)
        if checkpoint:
            shutil.copytree(checkpoint, folder)
        else:
            folder.mkdir(parents=True)
            (folder / "weights.txt").write_text(f"{name} {weights}")
        self._manifests = getattr(self, "_manifests", {})
        self._manifests[name] = seal(
            folder, candidate=name, strategy="load", config={}, parent=None, parameters=1, facts={}
        )

    def set_questions(self, questions):
        layout.DATA.mkdir(exist_ok=True)
        layout.QUESTIONS.write_text(questions)
        for name in ("train", "calibration"):
            (layout.DATA / f"{name}.jsonl").write_text(name)
        (layout.DATA / "summary.json").write_text(json.dumps({"questions": {"rows": QUESTIONS}}))

    def evaluate(self, right, energy_j=5.0, sizes=SIZES):
        """Writes evaluations in which the first `right[name]` questions are answered correctly, and registers them."""
        for name, count in right.items():
            rows = [{"id": str(n), "choice_right": n < count, "hallucinated": n >= count} for n in range(QUESTIONS)]
            layout.answers(name).parent.mkdir(exist_ok=True)
            layout.answers(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
            share = count / QUESTIONS
            record = results.evaluation(
                candidate=name,
                sha256=self._manifests[name].artifact_sha256,
                accuracy_choice=results.figure(share, n=QUESTIONS),
                hallucination_rate=results.figure(1 - share, n=QUESTIONS),
                energy_per_query_j=results.energy(energy_j),
                size_bytes=sizes[name],
                fits=dict.fromkeys(self._params.devices, True),
            )
            write_json(layout.metrics(name), record)
            write_json(layout.cost(name), {"seconds": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": 1})
        return self.register()

    def register(self):
        """Registers all evaluations; returns the version of each candidate."""
        register(self._params)
        return {name: entry["version"] for name, entry in json.loads(layout.REGISTRY.read_text()).items()}


@pytest.fixture(scope="module")
def project(tiny_params, checkpoint, tmp_path_factory):
    with contextlib.chdir(tmp_path_factory.mktemp("project")), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Project(tiny_params, checkpoint)


@pytest.fixture
def device(request):
    """A different device for each test, so that tests do not share champions."""
    return DEVICES[
        1 + [item.name for item in request.session.items if item.path == request.path].index(request.node.name)
    ]


def alias(name):
    version = model_versions.version_of(name)
    return version and str(version.version)


def aliases(device):
    return tuple(alias(f"{kind}-{device}") for kind in ("champion", "challenger", "previous"))


def reason_of(version, what, device):
    return getattr(roles_of(version)[device], what)


def roles_of(version):
    return read_roles(model_versions.client().get_model_version("lilliput", version))


def promotion_of(device):
    return json.loads(layout.PROMOTION.read_text())[device]


def test_champion_and_challenger_get_aliases_and_reasons(project, device):
    versions = project.evaluate(EVEN)
    promote(project.params(device))
    assert aliases(device) == (versions["b"], versions["a"], None)
    assert "best accuracy (0.700)" in reason_of(versions["b"], "promoted", device)
    assert "b is ahead in accuracy, which decides" in reason_of(versions["a"], "refused", device)
    assert promotion_of(device)["challenger"] == "a"
    promote(project.params("laptop"))
    assert aliases(device) == (None, None, None)  # of a device that params.yaml no longer has


def test_every_version_carries_metrics_lineage_and_card(project):
    version = model_versions.client().get_model_version("lilliput", project.evaluate(EVEN)["a"])
    assert version.tags["lilliput.artifact_sha256"] == project._manifests["a"].artifact_sha256
    assert version.description.startswith("**a**: Made from")
    assert model_versions.client().get_run(version.run_id).data.metrics["accuracy_choice"] == 0.6


def test_a_new_champion_is_in_the_outbox_once(project, device):
    outbox.clear(Path.cwd())
    versions, params = project.evaluate(EVEN), project.params(device, prefer="size")
    promote(params)
    promote(params)  # the same champion is not a change
    (change,) = outbox.read(Path.cwd())
    assert (change["device"], change["champion"], change["version"]) == (device, "a", versions["a"])
    assert change["before"] is None and "best size" in change["reason"]
    project.evaluate(EVEN, energy_j=5.25)
    promote(params)  # nor is the same model, measured again
    assert outbox.read(Path.cwd()) == [change]
    promote(project.params(device))
    roll_back(project.params(device), device, "")
    assert [(change["before"], change["champion"]) for change in outbox.read(Path.cwd())[1:]] == [
        ("a", "b"),
        ("b", "a"),
    ]
    outbox.clear(Path.cwd())
    assert outbox.read(Path.cwd()) == []
    project.evaluate(EVEN)


def test_a_workspace_uses_its_own_store_despite_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    folder = tmp_path / "workspaces" / "tiny"
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        assert model_versions.tracking_uri() == f"sqlite:///{folder}/mlruns/mlflow.db"
    with contextlib.chdir(tmp_path):
        assert model_versions.tracking_uri() == "http://tracking.example:5000"


def test_artefacts_of_the_embedded_store_are_in_mlruns_artifacts(project, device):
    version = model_versions.client().get_model_version("lilliput", project.evaluate(EVEN)["a"])
    run = model_versions.client().get_run(version.run_id)
    assert run.info.artifact_uri.startswith(f"{(layout.MLRUNS / 'artifacts').absolute().as_uri()}/")


def test_a_rollback_holds_until_the_rules_change(project, device):
    versions, params = project.evaluate(EVEN), project.params(device, prefer="size")
    promote(params)  # a is the smallest
    changed = project.params(device, prefer="accuracy")
    promote(changed)
    assert aliases(device) == (versions["b"], versions["a"], versions["a"])
    roll_back(changed, device, "speaks in rhymes" + "." * 5000)
    assert aliases(device) == (versions["a"], None, versions["b"])
    assert "speaks in rhymes" in reason_of(versions["b"], "refused", device)
    for _ in range(2):
        promote(changed)
        assert alias(f"champion-{device}") == versions["a"]
        assert "speaks in rhymes" in promotion_of(device)["refused"]["b"]
    promote(project.params(device, prefer="accuracy", max_accuracy_drop=0.06))
    assert aliases(device) == (versions["b"], versions["a"], versions["a"])


def test_a_second_rollback_undoes_the_first(project, device):
    versions = project.evaluate(EVEN)
    promote(project.params(device, prefer="size"))
    params = project.params(device)
    promote(params)
    roll_back(params, device, "")
    roll_back(params, device, "")
    promote(params)
    assert aliases(device)[::2] == (versions["b"], versions["a"])


def test_a_new_evaluation_ends_a_rollback(project, device):
    project.evaluate(EVEN)
    promote(project.params(device, prefer="size"))
    params = project.params(device)
    promote(params)
    roll_back(params, device, "")
    versions = project.evaluate(EVEN | {"b": 141})
    promote(params)
    assert alias(f"champion-{device}") == versions["b"]
    project.evaluate(EVEN)


def test_a_rollback_without_a_previous_champion_is_rejected(project, device):
    project.evaluate(EVEN)
    promote(project.params(device))
    with pytest.raises(ConfigError, match="no earlier champion to restore"):
        roll_back(project.params(device), device, "")
    with pytest.raises(ConfigError, match="no such device"):
        roll_back(project.params(device), "toaster", "")


def test_candidates_behind_the_champion_are_refused_and_repeated_runs_do_not_lower_the_level(project, device):
    sizes = {"base": 100, "a": 300, "b": 200}
    versions = project.evaluate({"base": 128, "a": 140, "b": 134}, sizes=sizes)
    promote(project.params(device))
    assert alias(f"champion-{device}") == versions["a"]
    params = project.params(device, prefer="size", max_accuracy_drop=0.08)
    promote(params)  # b may lie 0.055 below the champion, the smaller base 0.095
    assert aliases(device) == (versions["b"], versions["base"], versions["a"])
    assert "below that of the champion so far (a)" in reason_of(versions["base"], "refused", device)
    promote(params)  # the base may lie no more than 0.055 below b
    assert aliases(device)[::2] == (versions["b"], versions["a"])
    assert "nothing has changed since" in reason_of(versions["base"], "refused", device)


def test_a_champion_whose_candidate_became_worse_stays(project, device):
    versions, params = project.evaluate(EVEN), project.params(device, prefer="accuracy")
    promote(params)
    project.make("b", weights="1")
    later = project.evaluate({**EVEN, "b": 110})
    promote(params)
    assert alias(f"champion-{device}") == versions["b"]
    assert promotion_of(device)["champion"] == f"b (version {versions['b']})"
    assert promotion_of(device)["compiled"] is None
    assert "dominated" in reason_of(later["b"], "refused", device)
    project.set_questions("other questions")
    elsewhere = project.evaluate({**EVEN, "a": 121, "b": 110})
    promote(params)
    assert alias(f"champion-{device}") == elsewhere["a"]
    assert "not compared with the champion so far" in promotion_of(device)["reason"]
    assert "other questions" in promotion_of(device)["reason"]
    project.set_questions("these questions")
    project.make("b")


def test_the_same_model_measured_again_replaces_itself(project, device):
    first, params = project.evaluate(EVEN), project.params(device)
    promote(params)
    second = project.evaluate(EVEN, energy_j=5.5)
    assert second["b"] != first["b"]
    promote(params)
    assert aliases(device)[::2] == (second["b"], None)


def test_a_person_approves_or_denies_if_the_rules_require_it(project, device):
    versions, params = project.evaluate(EVEN), project.params(device, approval=True)
    promote(params)
    assert aliases(device) == (None, versions["b"], None)
    assert "waits for a person's approval" in promotion_of(device)["reason"]
    (proposal,) = proposals(params)
    assert (proposal.device, proposal.version) == (device, versions["b"])
    promote(params, {device: ApprovalAnswer("999", True, "another version")})
    assert alias(f"champion-{device}") is None
    promote(params, {device: ApprovalAnswer(versions["b"], False, "too terse")})
    assert alias(f"champion-{device}") is None
    assert "too terse" in reason_of(versions["b"], "refused", device)
    (proposal,) = proposals(params)
    assert proposal.version == versions["a"]  # the denied one is not proposed again
    promote(params, {device: ApprovalAnswer(versions["a"], True, "fine")})
    assert alias(f"champion-{device}") == versions["a"]
    assert reason_of(versions["a"], "promoted", device).endswith("fine")
    promote(params)
    assert alias(f"champion-{device}") == versions["a"]
    assert proposals(params) == []


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("a.jsonl", lambda _: '{"id": ', "a.jsonl:1"),
        ("a.json", lambda _: '{"candidate": ', "a.json: Invalid JSON"),
        ("a.json", lambda text: text.replace('"accessibility"', '"unknown"'), "a.json: accessibility: Field required"),
    ],
)
def test_a_damaged_or_old_evaluation_in_mlflow_is_an_artifact_error(project, monkeypatch, file, damage, message):
    version = model_versions.client().get_model_version("lilliput", project.evaluate(EVEN)["a"])
    params, read = project.params("laptop"), model_versions.read_artifact
    assert read_past_champion(params, "laptop", version).answers

    def read_damaged(run, path):
        return damage(read(run, path)) if path == file else read(run, path)

    monkeypatch.setattr(model_versions, "read_artifact", read_damaged)
    with pytest.raises(ArtifactError, match=f"evaluation in MLflow is damaged: {message}"):
        read_past_champion(params, "laptop", version)


def test_simultaneous_promotions_see_each_others_result(project, device, monkeypatch):
    versions, set_alias = project.evaluate(EVEN), model_versions.set_alias

    def slowly(alias, version):  # between reading the champion and replacing it
        time.sleep(0.5)
        set_alias(alias, version)

    monkeypatch.setattr(model_versions, "set_alias", slowly)
    rules = [project.params(device, prefer=prefer, max_accuracy_drop=1.0) for prefer in ("size", "accuracy")]
    threads = [threading.Thread(target=promote, args=[params]) for params in rules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The second promotion sees the first champion; without the lock there would be no previous champion.
    assert {alias(f"champion-{device}"), alias(f"previous-{device}")} == {versions["a"], versions["b"]}


def test_simultaneous_rollbacks_and_promotions_leave_consistent_records(project, device):
    """For example by hand on another machine while a scheduled flow decides."""
    versions, params = project.evaluate(EVEN), project.params(device)
    promote(project.params(device, prefer="size"))
    promote(params)
    errors, started = [], threading.Barrier(2)

    def repeat(decide):
        started.wait(60)
        for _ in range(4):
            try:
                decide()
            except Exception as error:
                errors.append(error)

    both = [
        threading.Thread(target=repeat, args=[lambda: promote(params)]),
        threading.Thread(target=repeat, args=[lambda: roll_back(params, device, "a race")]),
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(240)
    assert errors == []
    champion = promotion_of(device)["champion"]
    assert versions[champion] == alias(f"champion-{device}")
    assert {alias(f"champion-{device}"), alias(f"previous-{device}")} == {versions["a"], versions["b"]}
    last = [change for change in outbox.read(Path()) if change["device"] == device][-1]
    assert (last["champion"], last["version"]) == (champion, versions[champion])
    promote(params)  # the rollback holds
    assert promotion_of(device)["champion"] == champion


def test_a_registered_model_answers_through_mlflow_from_the_store_only(project, opened, tmp_path):
    import mlflow

    versions = project.evaluate(EVEN)
    model_versions.client()
    address = f"models:/lilliput/{versions['base']}"
    system = project._params.data.system_prompt
    prompt = encode_prompt(opened[1], system, "What is the capital of Peru?")
    answers = TorchRuntime(*opened, batch_size=1).generate([prompt], project._params.evaluation.max_new_tokens)
    shutil.move(layout.model("base"), tmp_path / "base")  # the weights are in the store
    with contextlib.chdir(tmp_path):
        assert mlflow.pyfunc.load_model(address).predict(["What is the capital of Peru?"]) == answers
    assert not [*layout.MLRUNS.rglob("*.pkl")]
    shutil.move(tmp_path / "base", layout.model("base"))
    run_id = model_versions.client().get_model_version("lilliput", versions["base"]).run_id
    stored = layout.MLRUNS / "artifacts" / run_id / "artifacts/model/form"
    assert (stored / "config.json").samefile(layout.model("base") / "config.json")  # no second copy on the disk
    (stored / "config.json").unlink()
    (stored / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="altered"):
        mlflow.pyfunc.load_model(address)
    shutil.rmtree(stored)
    assert mlflow.pyfunc.load_model(address).predict(["What is the capital of Peru?"]) == answers  # the project has it
    project.make("base", weights="1")
    with contextlib.chdir(tmp_path), pytest.raises(ArtifactError, match="dvc pull models/base"):
        mlflow.pyfunc.load_model(address)
