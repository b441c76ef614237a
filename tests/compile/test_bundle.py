import json
import shutil

import pytest
from transformers import AutoTokenizer

from lilliput.artifacts import read_manifest, seal, verify
from lilliput.chat_templates.built_in import BUILT_IN_TEMPLATES, TEMPLATE
from lilliput.compile.bundle import BundleSettings, prompt_template, write_bundle
from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget
from lilliput.devices.runs import DeviceJob, run_on_device
from lilliput.errors import ArtifactError

SETTINGS = BundleSettings("phone", 2, 512, 'Say "I don\'t know" if so.', 24, "Apache-2.0")


@pytest.fixture(scope="module")
def compiled(quantised, tmp_path_factory):
    """The folder of a compiled model, and its manifest."""
    folder = tmp_path_factory.mktemp("compiled")
    config = GgufTarget(candidate="small", target="gguf")
    facts = compile_gguf(quantised(), folder, config)
    (folder / "parity.json").write_text("{}")
    manifest = seal(
        folder,
        candidate="small-gguf",
        strategy="gguf",
        config=config.model_dump(mode="json"),
        parent=None,
        parameters=1,
        facts=facts,
    )
    return folder, manifest


@pytest.fixture(scope="module")
def bundle(compiled, quantised, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(folder, compiled[0], quantised(), compiled[1], SETTINGS)
    return folder


def test_a_bundle_is_complete_and_verifiable(bundle):
    names = {path.name for path in bundle.iterdir()}
    assert {
        "model.gguf",
        "tokenizer.json",
        "prompt.json",
        "parity.json",
        "Modelfile",
        "README.md",
        "lilliput.json",
    } <= names
    manifest = verify(bundle)
    assert manifest.facts["licence"] == "Apache-2.0"
    assert manifest.parent == "small-gguf"


def test_the_prompt_follows_the_model_s_chat_template(bundle, quantised):
    prompt = json.loads((bundle / "prompt.json").read_text())
    assert prompt["template"] == prompt_template(AutoTokenizer.from_pretrained(quantised()), SETTINGS.system_prompt)
    assert prompt["template"].count("{{question}}") == prompt["template"].count("{{system}}") == 1
    assert prompt["sampling"] == {"temperature": 0.0, "max_new_tokens": 24}
    modelfile = (bundle / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./model.gguf\n")
    assert "{{ .System }}" in modelfile
    assert "{{ .Prompt }}" in modelfile
    assert f"SYSTEM {SETTINGS.system_prompt}\n" in modelfile
    assert 'PARAMETER stop "<|im_end|>"\n' in modelfile


def test_the_bundle_alone_is_enough_to_run_the_model(bundle):
    assert run_on_device(
        DeviceJob("gguf", str(bundle), 1, 64, prompts=[[5, 6, 7]], max_tokens=2), memory_bytes=None, deadline_s=60
    ).fits


def test_a_tampered_bundle_is_rejected(bundle, tmp_path):
    bundle = shutil.copytree(bundle, tmp_path / "tampered")
    with (bundle / "model.gguf").open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last[0] ^ 1]))
    with pytest.raises(ArtifactError, match=r"model\.gguf: altered or truncated"):
        verify(bundle)
    assert read_manifest(bundle).candidate == "small-gguf"


def test_the_readme_explains_the_start_in_five_steps(bundle):
    steps = [line for line in (bundle / "README.md").read_text().splitlines() if line[:1].isdigit()]
    assert len(steps) == 5
    assert "llama-server -m model.gguf --jinja -c 512 -t 2" in steps[1]


def test_the_readme_says_how_functions_are_sent_if_the_template_shows_them(bundle, compiled, quantised, tmp_path):
    checkpoint, folder = shutil.copytree(quantised(), tmp_path / "checkpoint"), tmp_path / "bundle"
    folder.mkdir()
    shutil.copyfile(BUILT_IN_TEMPLATES / "chatml-tools.jinja", checkpoint / TEMPLATE)
    write_bundle(folder, compiled[0], checkpoint, compiled[1], SETTINGS)
    assert "6. Functions: llama.cpp's server writes the `tools`" in (folder / "README.md").read_text()
    assert "Functions" not in (bundle / "README.md").read_text()


def test_the_licence_s_texts_accompany_the_bundle(bundle, compiled, quantised, tmp_path):
    source, folder = shutil.copytree(compiled[0], tmp_path / "compiled"), tmp_path / "bundle"
    folder.mkdir(), (source / "licence").mkdir()
    (source / "licence" / "TERMS.html").write_text("<p>Terms")
    write_bundle(folder, source, quantised(), compiled[1], SETTINGS)
    assert (folder / "licence" / "TERMS.html").read_text() == "<p>Terms"
    manifest = verify(folder)
    assert "licence/TERMS.html" in manifest.files
    assert manifest.size_bytes == read_manifest(bundle).size_bytes + len((folder / "README.md").read_bytes()) - len(
        (bundle / "README.md").read_bytes()
    )
    assert "its text is in licence/ (TERMS.html) and must accompany every copy" in (folder / "README.md").read_text()
