"""Distillation of a quantised student: its codes learn, and the file holds exactly what was trained."""

import json
import shutil

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from lilliput.codes import Codes, read_codes
from lilliput.compile.gguf import compile_gguf
from lilliput.compress import distill as distill_module
from lilliput.compress.distill import distill
from lilliput.compress.packing import linears
from lilliput.compress.rtn import rtn
from lilliput.compress.through_rounding import _Rounding, round_in_forward_pass, with_trained_codes
from lilliput.config import DistillConfig, GgufTarget, RtnConfig
from lilliput.errors import StrategyError
from lilliput.models import open_model
from tests.compress.test_distill import DISTILL
from tests.contexts import context

LAYER = "model.layers.1.mlp.up_proj"


def config(**changes):
    return DistillConfig(**DISTILL | {"kl_weight": 1.0, "temperature": 1.0, "learning_rate": 1e-3} | changes)


@pytest.fixture(scope="module", params=[True, False], ids=["symmetric", "asymmetric"])
def student(request, checkpoint, facts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "rtn"
    settings = RtnConfig(bits=4, group_size=32, symmetric=request.param)
    rtn(context(checkpoint, held_out=facts[:2]), settings).save(folder)
    return folder


@pytest.fixture(scope="module")
def result(student, checkpoint, facts):
    return distill(context(student, facts, facts[:4], teacher=checkpoint), config(steps=12))


@pytest.fixture(scope="module")
def saved(result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "student"
    result.save(folder)
    return folder


def test_only_codes_change_and_scales_stay(student, saved):
    before, after = dict(read_codes(student)), dict(read_codes(saved))
    assert before.keys() == after.keys()
    assert any((before[name].codes != after[name].codes).any() for name in before)
    for name in before:
        assert (before[name].scales == after[name].scales).all()
        assert (before[name].zeros == after[name].zeros).all()
    ours, theirs = open_model(saved)[0].state_dict(), open_model(student)[0].state_dict()
    quantised = {f"{name}.weight" for name in before}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() - quantised)


def test_the_checkpoint_has_its_parents_form(student, saved):
    assert json.loads((saved / "quantize_config.json").read_text()) == json.loads(
        (student / "quantize_config.json").read_text()
    )
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (student, saved)]
    assert sizes[0] == sizes[1]


def test_the_student_comes_nearer_to_its_teacher(result):
    losses = [value for _, value in result.history["loss"]]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.slow
def test_compiled_file_holds_the_weights_of_the_last_forward_pass(student, checkpoint, facts, tmp_path, monkeypatch):
    """Bit for bit: the weights that the model computed with, the reopened checkpoint's, and the GGUF file's."""
    forward = {}

    def spy(model):
        forward.update({name: linear.weight.detach().clone() for name, linear in linears(model).items()})
        return with_trained_codes(model)

    monkeypatch.setattr(distill_module, "with_trained_codes", spy)
    result = distill(context(student, facts, facts[:4], teacher=checkpoint), config(steps=3))
    result.save(tmp_path / "trained")
    assert all(torch.equal(linear.weight, forward[name]) for name, linear in linears(result.model).items())
    reopened = open_model(tmp_path / "trained")[0]
    assert all(torch.equal(linear.weight, forward[name]) for name, linear in linears(reopened).items())
    if next(read_codes(student))[1].symmetric:  # Q4_1 rounds its offsets to float16
        compile_gguf(tmp_path / "trained", tmp_path, GgufTarget(candidate="trained", target="gguf"))
        tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
        stored = dequantize(tensors["blk.1.ffn_up.weight"].data, tensors["blk.1.ffn_up.weight"].tensor_type)
        assert torch.equal(torch.from_numpy(stored).reshape(forward[LAYER].shape), forward[LAYER])


def test_weights_start_at_the_teachers_where_the_codes_permit(student, checkpoint):
    model, teacher = open_model(student)[0], open_model(checkpoint)[0]
    before = {name: linear.weight.detach().clone() for name, linear in linears(model).items()}
    goals = linears(teacher)
    round_in_forward_pass(model, read_codes(student), goals)
    for name, linear in linears(model).items():
        assert torch.equal(linear.weight, before[name])  # the same codes
        start = linear.parametrizations.weight.original
        assert (start - goals[name].weight).abs().mean() < (before[name] - goals[name].weight).abs().mean()


def test_gradient_passes_straight_through():
    codes = Codes(*(torch.zeros(2, n, dtype=torch.uint8).numpy() + 8 for n in (32,)), *_scales(2), bits=4)
    weight = torch.randn(2, 32, requires_grad=True)
    gradient = torch.randn(2, 32)
    _Rounding(codes)(weight).backward(gradient)
    assert torch.equal(weight.grad, gradient)


def _scales(outputs):
    return (torch.full((outputs, 1), 0.1).half().numpy(), torch.full((outputs, 1), 8, dtype=torch.uint8).numpy())


@pytest.mark.slow
def test_a_killed_training_continues_to_the_same_codes(student, checkpoint, facts, tmp_path, monkeypatch):
    settings = config(steps=4, checkpoint_every=2)
    whole = distill(context(student, facts, facts[:4], teacher=checkpoint), settings)
    whole.save(tmp_path / "whole")
    folder = tmp_path / "checkpoints"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill_module, "with_trained_codes", _interrupt)
        distill(context(student, facts, facts[:4], teacher=checkpoint, checkpoints=folder), settings)
    shutil.rmtree(folder / "checkpoint-4", ignore_errors=True)
    assert (folder / "checkpoint-2").is_dir()
    distill(context(student, facts, facts[:4], teacher=checkpoint, checkpoints=folder), settings).save(
        tmp_path / "again"
    )
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "again"))
    assert one.read_bytes() == other.read_bytes()


def _interrupt(model):
    raise KeyboardInterrupt


def test_sharded_training_is_refused(student, checkpoint, facts, monkeypatch):
    monkeypatch.setattr(distill_module, "sharded", lambda: True)
    with pytest.raises(StrategyError, match="FSDP cannot shard a quantised student"):
        distill(context(student, facts, facts[:4], teacher=checkpoint), config())
