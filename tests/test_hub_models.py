"""Models of a hub on loopback, fetched by the stage `source` in its own process: the client reads settings once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from lilliput.errors import SourceError
from lilliput.hub import commit_of
from tests.conftest import PROJECT
from tests.ingestion.hub import COMMIT, REPOSITORY, serving

FETCH = """
import json, sys, time
from pathlib import Path
from lilliput.config import SourceConfig
from lilliput.errors import LilliputError
from lilliput.params import load_params
from tasks.source import fetch
time.sleep = lambda seconds: None  # the client waits between its attempts
params = load_params(Path(sys.argv[1]))
def outcome(model):
    try:
        return ["done", fetch(params.model_copy(update={"source": SourceConfig(model=model)}))]
    except LilliputError as error:
        return ["temporary" if getattr(error, "temporary", False) else "final", str(error)]
print(json.dumps([outcome(model) for model in sys.argv[2:]]))
"""
MOVING, FIXED = f"hub:{REPOSITORY}", f"hub:{REPOSITORY}@{COMMIT}"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def files():
    """A small model as the files of a repository, with a licence and with files that are never fetched."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return {
        "config.json": json.dumps(config).encode(),
        "tokenizer_config.json": b"{}",
        "model.safetensors": save({"weight": np.ones((300, 300), dtype=np.float32)}),
        "LICENSE.md": b"# Terms\n",
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"raise SystemExit",
    }


def fetch(folder: Path, address: str, *models: str, **environment: str) -> list[list[str]]:
    """Runs the stage in `folder` for each model in turn; returns how each ended, and its message."""
    cleared = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    settings = {"HF_HOME": str(folder / "hub"), "HF_ENDPOINT": address, "NO_PROXY": "127.0.0.1"} | environment
    command = [sys.executable, "-c", FETCH, str(PROJECT / "examples" / "tiny.yaml"), *models]
    variables = cleared | settings | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_name_without_a_commit_is_resolved_once_recorded_and_reported(files, tmp_path):
    with serving(files, "models") as (address, requests):
        first, again, branch, commit = fetch(tmp_path, address, MOVING, MOVING, f"{MOVING}@main", FIXED)
        assert first[0] == "done"
        assert f"{MOVING} is {FIXED}, recorded in hub-commits.json" in first[1]
        assert again == first
        assert len([request for request in requests if request.endswith(REPOSITORY)]) == 1  # asked once
    assert branch[0] == "done"
    assert commit == ["done", None]
    assert json.loads((tmp_path / "hub-commits.json").read_text()) == {MOVING: COMMIT, f"{MOVING}@main": COMMIT}
    assert fetch(tmp_path, NOWHERE, MOVING, HF_HUB_OFFLINE="1") == [first]  # from the record and the cache
    manifest = json.loads((tmp_path / "models/source/lilliput.json").read_text())
    assert manifest["facts"] == {"resolved": FIXED}
    assert manifest["config"]["model"] == MOVING
    assert manifest["files"].keys() == {
        *("config.json", "tokenizer_config.json", "model.safetensors", "licence/LICENSE.md")
    }


def test_a_gated_model_names_its_page_and_the_token(files, tmp_path):
    with serving(files, "models", gated=True) as (address, _):
        for model, (outcome, message) in zip((MOVING, FIXED), fetch(tmp_path, address, MOVING, FIXED), strict=True):
            assert outcome == "final"
            assert f"source.model: {model} is gated" in message
            assert f"{address}/{REPOSITORY}, and set HF_TOKEN" in message
    assert not (tmp_path / "models/source").exists()
    assert not (tmp_path / "hub-commits.json").exists()


def test_a_missing_model_or_commit_is_final(files, tmp_path):
    models = ["hub:org/other", f"hub:org/other@{COMMIT}", f"{MOVING}@dev", f"{MOVING}@{'1' * 40}"]
    with serving(files, "models") as (address, _):
        for model, (outcome, message) in zip(models, fetch(tmp_path, address, *models), strict=True):
            assert outcome == "final"
            assert f"source.model: {model} is not on the hub, or is private" in message
    assert not (tmp_path / "models/source").exists()


def test_an_unreachable_hub_is_temporary(tmp_path):
    for outcome, message in fetch(tmp_path, NOWHERE, MOVING, FIXED):
        assert outcome == "temporary"
        assert "the hub does not answer" in message and "run the same command again" in message
    for outcome, message in fetch(tmp_path, NOWHERE, MOVING, FIXED, HF_HUB_OFFLINE="1"):
        assert outcome == "temporary"
        assert "unset HF_HUB_OFFLINE" in message
    assert not (tmp_path / "models/source").exists()


def test_a_download_that_breaks_off_leaves_nothing_and_goes_on_with_what_arrived(files, tmp_path):
    with serving(files, "models", cut="model.safetensors") as (address, _):
        ((outcome, message),) = fetch(tmp_path, address, FIXED)
    assert outcome == "temporary"
    assert "the download broke off" in message and "fetches the missing files only" in message
    assert not [*(tmp_path / "models").iterdir()]
    assert not [*(tmp_path / "hub").rglob("*.incomplete")]
    with serving(files, "models") as (address, requests):
        assert fetch(tmp_path, address, FIXED) == [["done", None]]
        assert {
            request.rpartition("/")[2] for request in requests if request.startswith("GET") and "resolve" in request
        } == {"model.safetensors"}
    assert (tmp_path / "models/source/model.safetensors").read_bytes() == files["model.safetensors"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "weights are quantised as `bitsandbytes`"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "family `mamba`, MambaForCausalLM are not"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}, "names code (auto_map)"),
    ],
)
def test_a_model_that_is_not_supported_is_rejected_before_its_weights_are_fetched(files, tmp_path, config, message):
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | config).encode()
    with serving(files, "models") as (address, requests):
        ((outcome, text),) = fetch(tmp_path, address, FIXED)
    assert outcome == "final"
    assert message in text
    assert not [request for request in requests if "safetensors" in request and "resolve" in request]
    assert not (tmp_path / "models/source").exists()


@pytest.mark.parametrize("content", ["[]", "{", f'{{"{MOVING}": "main"}}'])
def test_a_damaged_record_of_commits_is_named(tmp_path, content):
    record = tmp_path / "hub-commits.json"
    record.write_text(content)
    with pytest.raises(SourceError, match=r"hub-commits\.json: not a JSON object with a commit"):
        commit_of(MOVING, record)
