"""The float parent of a candidate: the nearest ancestor with float weights, in the version that it was made from."""

import json
import shutil

import pytest

from lilliput.artifacts import read_manifest, seal
from lilliput.errors import ArtifactError
from tasks import layout
from tasks.devices import _float_parent

CODES = {"quant_method": "gptq", "bits": 4, "group_size": 32}


@pytest.fixture
def chain(checkpoint, tmp_path, monkeypatch):
    """Makes base → lora → gptq → distilled in the current folder; the last two are quantised."""
    monkeypatch.chdir(tmp_path)
    parent = None
    for name, quantised in (("base", False), ("lora", False), ("gptq", True), ("distilled", True)):
        parent = make(checkpoint, name, parent, quantised=quantised)


def make(checkpoint, name, parent, *, quantised=False, parameters=1):
    folder = layout.model(name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | ({"quantization_config": CODES} if quantised else {})))
    return seal(folder, candidate=name, strategy="load", config={}, parent=parent, parameters=parameters, facts={})


@pytest.mark.parametrize(
    ("candidate", "expected"), [("base", "base"), ("lora", "lora"), ("gptq", "lora"), ("distilled", "lora")]
)
def test_it_is_the_nearest_candidate_that_is_not_quantised(chain, candidate, expected):
    assert _float_parent(candidate) == (expected, layout.model(expected))


def test_a_parent_that_was_made_again_is_an_error(chain, checkpoint):
    make(checkpoint, "lora", read_manifest(layout.model("base")), parameters=2)
    with pytest.raises(ArtifactError, match="gptq was made from another version of lora; run `dvc repro`"):
        _float_parent("distilled")


def test_a_missing_parent_is_an_error(chain):
    shutil.rmtree(layout.model("lora"))
    with pytest.raises(ArtifactError, match="models/lora"):
        _float_parent("gptq")
