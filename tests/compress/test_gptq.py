import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from lilliput.compress.gptq import gptq
from lilliput.compress.packing import linears
from lilliput.config import GptqConfig
from lilliput.errors import StrategyError
from lilliput.models import open_model
from lilliput.saving import probe_logits, prove_reload
from lilliput.training.examples import encode_examples
from tests.contexts import SYSTEM, context, saved, weights_of

CONFIG = {"bits": 4, "group_size": 32, "symmetric": True, "act_order": False, "calibration_examples": 16}
CONFIG |= {"damp_percent": 0.05, "seed": 3}


@pytest.fixture(scope="module")
def quantised(checkpoint, facts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq")
    result = gptq(context(checkpoint, facts, facts), GptqConfig(**CONFIG))
    result.save(folder)
    return result, folder


def test_checkpoint_has_autogptqs_format(quantised):
    _, folder = quantised
    config = json.loads((folder / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    assert config["checkpoint_format"] == "gptq"
    tensors = load_file(folder / "model.safetensors")
    up = "model.layers.0.mlp.up_proj"
    assert tensors[f"{up}.qweight"].shape == (64 * 4 // 32, 128)
    assert tensors[f"{up}.qweight"].dtype == torch.int32
    assert tensors[f"{up}.scales"].shape == (64 // 32, 128)


def test_codes_differ_from_weights_by_less_than_half_a_step_on_average(quantised, checkpoint):
    _, folder = quantised
    weight = open_model(checkpoint)[0].model.layers[1].mlp.up_proj.weight
    quantised_weight = open_model(folder)[0].model.layers[1].mlp.up_proj.weight
    scales = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.scales"].float()
    steps = (quantised_weight - weight).abs().mean() / scales.mean()
    assert steps < 0.5  # rounding to nearest gives 0.25; GPTQ moves some weights further to compensate others


@pytest.mark.slow
def test_reopened_checkpoint_equals_the_model_in_memory(quantised):
    result, folder = quantised
    assert prove_reload(folder, probe_logits(result.model, result.tokenizer), 1e-3) <= 1e-3


def test_gptq_changes_a_layer_less_than_rounding_to_nearest(quantised, checkpoint, facts):
    _, folder = quantised
    model, tokenizer = open_model(checkpoint)
    inputs = []
    layer = model.model.layers[0].mlp.up_proj
    handle = layer.register_forward_hook(lambda _module, args, _output: inputs.append(args[0][0]))
    for example in encode_examples(tokenizer, SYSTEM, facts):
        model(input_ids=torch.tensor([example.input_ids]))
    handle.remove()
    x, weight = torch.cat(inputs), layer.weight.detach()
    gptq_weight = open_model(folder)[0].model.layers[0].mlp.up_proj.weight
    grouped = weight.reshape(128, 2, 32)
    scale = grouped.abs().amax(-1, keepdim=True) * 2 / 15
    nearest = ((grouped / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)
    error = [((x @ (w - weight).T) ** 2).mean().item() for w in (gptq_weight, nearest)]
    assert error[0] < 0.9 * error[1]


def test_facts_hold_perplexities_and_float_modules(quantised):
    facts = quantised[0].facts
    assert facts["perplexity_after"] == pytest.approx(facts["perplexity_before"], rel=0.2)
    assert facts["perplexity_after"] != facts["perplexity_before"]
    assert facts["float_modules"] == ["lm_head", "model.embed_tokens"]
    assert [layer for layer, _ in quantised[0].history["layer_error"]] == [0, 1, 2, 3]


def test_same_inputs_same_bytes(quantised, checkpoint, facts, tmp_path):
    gptq(context(checkpoint, facts, facts[:2]), GptqConfig(**CONFIG)).save(tmp_path)
    first, second = (
        hashlib.sha256((f / "model.safetensors").read_bytes()).hexdigest() for f in (quantised[1], tmp_path)
    )
    assert first == second


@pytest.fixture(scope="module")
def quantise_with(checkpoint, facts, tmp_path_factory):
    """Makes and saves a checkpoint with other settings, once per setting."""
    known = {}

    def make(**changes):
        key = tuple(sorted(changes.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("quantised")
            result = gptq(context(checkpoint, facts, facts[:2]), GptqConfig(**CONFIG | changes))
            result.save(folder)
            known[key] = result, folder
        return known[key]

    return make


GRIDS = [
    {"bits": 8, "group_size": 32, "symmetric": False, "act_order": False},
    {"bits": 4, "group_size": 16, "symmetric": False, "act_order": True},
    {"bits": 3, "group_size": 32, "symmetric": False, "act_order": False},
    {"bits": 3, "group_size": 16, "symmetric": True, "act_order": True},
    {"bits": 2, "group_size": 32, "symmetric": False, "act_order": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "-".join(map(str, grid.values())))
def test_every_grid_reopens_to_the_model_in_memory_near_the_float_weights(quantise_with, checkpoint, grid):
    result, folder = quantise_with(**grid)
    reopened, tensors = open_model(folder)[0], load_file(folder / "model.safetensors")
    torch.testing.assert_close(weights_of(reopened), weights_of(result.model), rtol=0, atol=1e-6)
    up = "model.layers.2.mlp.up_proj"
    assert tensors[f"{up}.qweight"].shape == (64 * grid["bits"] // 32, 128)
    groups = tensors[f"{up}.g_idx"].long()
    assert (groups.tolist() == sorted(groups.tolist())) is not grid["act_order"]
    steps = tensors[f"{up}.scales"].float()[groups].T
    original = load_file(checkpoint / "model.safetensors")[f"{up}.weight"]
    distance = ((reopened.get_submodule(up).weight - original).abs() / steps).mean()
    assert distance < 0.6  # rounding to nearest gives 0.25; GPTQ moves some weights further to compensate others


def test_error_decreases_with_bits(quantised, quantise_with, checkpoint):
    original = probe_logits(*open_model(checkpoint))
    plain = {grid["bits"]: quantise_with(**grid)[0] for grid in GRIDS if grid["group_size"] == 32} | {4: quantised[0]}
    errors = [
        (probe_logits(result.model, result.tokenizer) - original).square().mean().sqrt().item()
        for _, result in sorted(plain.items())
    ]
    assert len(errors) == 4
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.3 * errors[2]


def test_rejects_a_group_size_that_divides_no_layer_before_quantising(checkpoint, facts):
    with pytest.raises(StrategyError, match=r"128 does not divide.*64; choose one of 64, 32, 16"):
        gptq(context(checkpoint, facts, facts), GptqConfig(**CONFIG | {"group_size": 128}))


def test_searched_scales_are_never_wider_and_reduce_rounding_error(quantised, checkpoint, facts, tmp_path):
    _, folder = quantised
    gptq(context(checkpoint, facts, facts), GptqConfig(**CONFIG | {"scale_search": 2.0})).save(tmp_path)
    name, weight = "model.layers.0.mlp.up_proj", open_model(checkpoint)[0].model.layers[0].mlp.up_proj.weight
    plain, searched = (load_file(each / "model.safetensors")[f"{name}.scales"].float() for each in (folder, tmp_path))
    assert (searched <= plain * 1.01).all()
    assert (searched < plain * 0.99).float().mean() > 0.3
    grouped = weight.detach().reshape(128, 2, 32)
    errors = []
    for scales in (plain, searched):
        scale = scales.T[..., None]
        errors.append(((grouped - (grouped / scale).round().clamp(-8, 7) * scale) ** 2).sum().item())
    assert errors[1] < errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "-".join(map(str, grid.values())))
def test_gptqmodel_opens_the_checkpoint_with_the_same_weights(quantise_with, grid):
    from gptqmodel import BACKEND, GPTQModel

    result, folder = quantise_with(**grid)
    peer = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    for name, linear in linears(result.model).items():
        packed = peer.get_submodule(name)
        packed.scales.data = packed.scales.data.float()
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(packed.dequantize_weight().T.float(), linear.weight), name


def test_rejects_a_layer_that_cannot_be_solved(checkpoint, facts, tmp_path):
    model, tokenizer = open_model(checkpoint)
    model.model.layers[1].post_attention_layernorm.weight.data.fill_(1e30)
    parent = saved(model, tokenizer, tmp_path)
    with pytest.raises(StrategyError, match=r"layers\.1\.mlp\.gate_proj: its inputs hold NaN or infinite"):
        gptq(context(parent, facts, facts[:1]), GptqConfig(**CONFIG))
