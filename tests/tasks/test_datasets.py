"""The corpus as dataset inputs of MLflow's runs."""

import contextlib
import hashlib
import json

import pytest
from mlflow import MlflowClient

from tasks import layout
from tasks.registry import store
from tasks.registry.datasets import dataset_inputs

# MLflow, SQLAlchemy and pandas emit warnings about their own code.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def corpus(tmp_path):
    with contextlib.chdir(tmp_path):
        layout.DATA.mkdir()
        for name in ("train", "calibration", "questions"):
            (layout.DATA / f"{name}.jsonl").write_text(f"rows of {name}")
        counts = {"rows": 20, "groups": 7, "unanswerable": 3, "answerable": {"capital": 17}}
        (layout.DATA / "summary.json").write_text(json.dumps({"train": counts, "questions": counts}))
        yield


def test_a_run_names_each_file_with_digest_split_and_size(corpus, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store.prepare(store.tracking_uri())
    client = MlflowClient(store.tracking_uri())
    run = client.create_run(client.create_experiment("data")).info.run_id
    for _ in range(2):  # an interrupted registration logs again
        client.log_inputs(run, dataset_inputs("corpora/facts.yaml"))
    inputs = {item.tags[0].value: item.dataset for item in client.get_run(run).inputs.dataset_inputs}
    assert len(client.get_run(run).inputs.dataset_inputs) == len(inputs) == 3
    sha256 = hashlib.sha256(b"rows of questions").hexdigest()
    questions = inputs["evaluation"]
    assert (questions.name, questions.digest) == ("corpora/facts.yaml: questions", sha256[:36])
    assert json.loads(questions.source) == {"uri": "data/questions.jsonl", "sha256": sha256}
    assert json.loads(questions.profile) == {"rows": 20, "groups": 7, "unanswerable": 3}
    assert json.loads(inputs["calibration"].profile) == {}
