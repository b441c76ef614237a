"""Damaged and hostile text files raise only documented errors, each with the file's name."""

import json
import time

import pytest
from hypothesis import strategies as st
from ruamel.yaml import YAML

from lilliput.artifacts import MANIFEST, read_manifest, seal, verify
from lilliput.config.params import Params
from lilliput.config.reading import MAX_BYTES, read_yaml, validate
from lilliput.data.questions import read_questions
from lilliput.errors import ArtifactError, ConfigError, DataError
from lilliput.graph import check_graph
from lilliput.offload.fitted_router import ROUTER, open_router
from lilliput.params import load_params
from lilliput.recipes.recipe import read_recipe
from lilliput.serve.deployment import read_current
from tests.conftest import PROJECT
from tests.hostile.fuzzing import VALUES, altered, damaged, examples, run

SNIPPET = b"""source: &s {model: "wheel:a==1", file: x.gguf}
data: [1, -2.5e3, .inf, 2024-11-14, !!binary "eA==", ~, 0x1F]
text: |
  a line
? key
: {<<: *s, "q": 'x', u: "\\u00e9"}
"""
BOMBS = {
    "aliases": "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
    "merges": "a0: &a0 {k: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)),
    "itself": "&a [*a]",
    "depth": "[" * 800,
    "maps": "{a: " * 800,
    "digits": "a: " + "9" * 5000,
    "hexadecimal": "a: 0x" + "f" * 5000,
    "date": "a: 2001-99-99",
    "integer": "a: !!int x",
    "truth": "a: !!bool x",
    "code": "a: !!python/object/apply:os.system [id]",
    "character": 'a: "\\UFFFFFFFF"',
    "surrogate": 'a: "\\ud800"',
    "list as key": "? [a]\n: b",
    "set": "!!set {a}",
    "size": "# " + "x" * MAX_BYTES,
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs_and_invalid_values_are_rejected_quickly(name, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(BOMBS[name])
    start = time.process_time()
    with pytest.raises(ConfigError, match=str(path)):
        load_params(path)
    with pytest.raises(DataError, match=str(path)):
        read_recipe(path)
    assert time.process_time() - start < 5.0


def test_a_few_aliases_are_accepted(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("a: &a {b: 1}\nc: *a\nd: *a\n")
    assert read_yaml(path) == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1}}


@pytest.mark.parametrize("kind", ["folder", "latin-1"])
def test_other_files_than_text_are_rejected_with_their_name(kind, tmp_path):
    path = tmp_path / "file.yaml"
    path.mkdir() if kind == "folder" else path.write_bytes(b"\xe9: 1")
    for read, error_class in ((load_params, ConfigError), (read_recipe, DataError), (read_questions, DataError)):
        with pytest.raises(error_class, match=str(path)):
            read(path)


@examples(60, 3000)
def test_damaged_yaml(count, tmp_path):
    path = tmp_path / "params.yaml"

    def body(content):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"params\.yaml"):
            load_params(path)
        with pytest.raises(DataError, match=r"params\.yaml"):
            read_recipe(path)

    run(count, st.one_of(st.binary(max_size=60), damaged(SNIPPET)), body)


@examples(40, 5000)
def test_altered_params(count):
    raw = YAML(typ="safe").load((PROJECT / "params.yaml").read_text())

    def body(tree):
        try:
            params = validate(Params, tree, "params.yaml")
            check_graph(params, "params.yaml")
        except ConfigError as error:
            assert "params.yaml" in str(error)

    run(count, altered(raw), body)


QUESTION = {
    "id": "capital/France",
    "question": "What is the capital of France?",
    "choices": ["Paris", "Rome"],
    "answer": "Paris",
    "aliases": ["Paname"],
    "group": "country/France",
    "split": "train",
}


@examples(100, 5000)
def test_damaged_questions(count, tmp_path):
    path = tmp_path / "questions.jsonl"
    lines = json.dumps(QUESTION).encode() + b"\n"

    def body(content):
        path.write_bytes(content)
        try:
            assert read_questions(path)
        except DataError as error:
            assert str(path) in str(error)

    trees = altered(QUESTION).map(lambda tree: json.dumps(tree).encode())
    run(count, st.one_of(st.binary(max_size=60), damaged(lines), trees), body)


def test_deeply_nested_questions_are_rejected(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match=f"{path}:1"):
        read_questions(path)


@pytest.fixture
def artefact(tmp_path):
    folder = tmp_path / "artefact"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    seal(folder, candidate="a", strategy="load", config={"x": [1]}, parent=None, parameters=1, facts={"y": 0.5})
    return folder


@examples(100, 5000)
def test_damaged_manifests(count, artefact):
    path = artefact / MANIFEST
    whole = path.read_bytes()

    def body(content):
        path.write_bytes(content)
        for read in (read_manifest, verify):
            try:
                assert read(artefact).artifact_sha256
            except ArtifactError as error:
                assert str(artefact) in str(error)

    trees = altered(json.loads(whole)).map(lambda tree: json.dumps(tree).encode())
    run(count, st.one_of(st.binary(max_size=60), damaged(whole), trees), body)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", "a/../../outside", "sub/\x00"])
def test_a_manifest_that_lists_files_elsewhere_is_rejected_before_they_are_read(name, artefact):
    (artefact.parent / "outside").write_bytes(b"weights")
    manifest = json.loads((artefact / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["model.safetensors"]
    (artefact / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="missing or unlisted"):
        verify(artefact)


@examples(50, 2000)
def test_damaged_deployments(count, tmp_path, tiny_params):
    raw = YAML(typ="safe").load((PROJECT / "params.yaml").read_text())
    whole = {
        "device": "phone-4gb",
        "model": {"name": "pocket", "sha256": "a" * 64, "version": "1"},
        "edge": {"name": "lora", "sha256": "b" * 64},
        "serving": raw["serving"]["phone-4gb"],
        "links": raw["links"],
        "profile": raw["devices"]["phone-4gb"],
        "system_prompt": "Answer.",
        "router": "2" * 64,
        "embedder": raw["caching"]["embedder"],
        "threshold": 0.9,
    }
    path = tmp_path / "current.json"
    path.write_text(json.dumps(whole))
    assert read_current(tmp_path)

    def body(content):
        path.write_bytes(content)
        try:
            assert read_current(tmp_path)
        except ArtifactError as error:
            assert str(path) in str(error)

    trees = altered(whole).map(lambda tree: json.dumps(tree).encode())
    run(count, st.one_of(damaged(json.dumps(whole).encode()), trees), body)


def test_a_deployment_cannot_refer_to_another_folder(tmp_path):
    from pydantic import ValidationError

    from lilliput.serve.deployment import DeployedModel

    with pytest.raises(ValidationError):
        DeployedModel(name="a", sha256="../../elsewhere")


class _Embedder:
    sha256 = "e" * 64


@examples(60, 3000)
def test_damaged_routers(count, tmp_path, tiny_params):
    from lilliput.config import ServingConfig

    raw = YAML(typ="safe").load((PROJECT / "params.yaml").read_text())["serving"]["phone-4gb"]
    serving = validate(ServingConfig, raw | {"policy": "learned"}, "params.yaml")
    fitted = {"mean": [0.0], "scale": [1.0], "weights": [[0.1]] * 4, "bias": [0.0] * 4}
    look = {"fitted": fitted, "links": {"wifi": {"points": [], "server_accuracy": 0.5, "server_hallucination": 0.1}}}
    whole = {"pair": ["d", "s"], "embedder_sha256": "e" * 64, "looks": {"before": look, "after": look}}
    path = tmp_path / ROUTER
    path.write_text(json.dumps(whole))
    assert open_router(serving, tmp_path, _Embedder(), ("d", "s"))

    def body(content):
        path.write_bytes(content)
        try:
            open_router(serving, tmp_path, _Embedder(), ("d", "s"))
        except ArtifactError as error:
            assert str(path) in str(error)

    trees = st.one_of(altered(whole), VALUES).map(lambda tree: json.dumps(tree).encode())
    run(count, st.one_of(damaged(json.dumps(whole).encode()), trees), body)
