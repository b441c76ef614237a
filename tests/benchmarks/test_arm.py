"""Next tokens on an emulated ARM processor; the emulation itself runs where `python -m benchmarks.arm` was run."""

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.arm import __main__ as command
from benchmarks.arm import emulated
from benchmarks.arm.next_tokens import write_logits
from benchmarks.record import SideFailed
from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget
from lilliput.runtime.llamacpp import LlamaCppRuntime

SYSTEM = list(range(300, 330))
TEXTS = [([*SYSTEM, 40 + row, 50], [7, 9 + row, 11]) for row in range(4)]


@pytest.fixture(scope="module")
def file(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    compile_gguf(checkpoint, folder, GgufTarget(candidate="a", target="gguf", floats="q8_0", embeddings="q8_0"))
    return folder / "model.gguf"


def test_logits_are_those_of_the_runtime(file, tmp_path):
    write_logits(file, TEXTS, tmp_path / "out.npy")
    expected = {}
    prompts, answers = zip(*TEXTS, strict=True)
    LlamaCppRuntime(file, threads=1, context_tokens=64).logits(prompts, answers, expected.__setitem__)
    actual = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(actual, np.concatenate([expected[row] for row in range(4)]), atol=1e-3)
    assert np.ptp(actual) > 1.0


def test_only_clear_differences_count_as_different():
    here = np.array([[5.0, 1.0, 0.0], [1.0, 0.9, 0.0], [0.0, 2.0, 0.0]], np.float32)
    there = here.copy()
    there[1] = [0.9, 1.0, 0.0]  # a near tie
    facts = command.compare(here, there, [0, 0, 1], clear_nats=0.5)
    assert (facts["tokens"], facts["same_tokens"], facts["clear_tokens"]) == (3, 2, 2)
    assert facts["differing_clear_tokens"] == 0
    assert facts["largest_lead_of_a_difference_nats"] == pytest.approx(0.1)
    there[2] = [0.0, 0.0, 2.0]
    assert command.compare(here, there, [0, 0, 1], clear_nats=0.5)["differing_clear_tokens"] == 1


def test_without_an_emulator_the_command_names_the_package(monkeypatch):
    monkeypatch.setattr(emulated.shutil, "which", lambda name: None)
    result = CliRunner().invoke(command.app)
    assert result.exit_code == command.UNUSABLE
    assert "error: no qemu-aarch64 on this machine; on Debian: apt-get install" in result.output


def test_without_a_bundle_nothing_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(emulated, "emulator", lambda: "qemu-aarch64")
    monkeypatch.setattr(emulated, "make", lambda: pytest.fail("made before the bundle was checked"))
    result = CliRunner().invoke(command.app, [str(tmp_path / "none")])
    assert result.exit_code == command.UNUSABLE
    assert "none" in result.output


@pytest.mark.slow
def test_an_emulated_arm_processor_has_the_same_next_tokens(file):
    try:
        emulated.emulator()
    except SideFailed as missing:
        pytest.skip(str(missing))
    if not emulated.is_made():
        pytest.skip(f"{emulated.FOLDER}: no environment; `python -m benchmarks.arm` makes it")
    here, there = command.both_logits(file, TEXTS)
    facts = command.compare(here, there, [token for _, answer in TEXTS for token in answer], clear_nats=0.5)
    assert facts["differing_clear_tokens"] == 0
    assert 0.0 < facts["largest_logit_difference"] < 0.5  # the instructions differ, so the last digits do
