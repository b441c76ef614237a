"""Stored weights compute what weights in float32 compute, to the bit, and stay in the checkpoint's files."""

import pytest
import torch
from safetensors.torch import load_file

from lilliput import models
from lilliput.code_layers import CodesLinear, hold_codes, unpack
from lilliput.compress.autogptq_format import _pack
from lilliput.compress.gptq import gptq
from lilliput.compress.lora import lora
from lilliput.models import open_frozen, open_model
from lilliput.saving import probe_logits, save_model
from lilliput.stored_weights import (
    _SCRATCH,
    StoredEmbedding,
    StoredLinear,
    as_stored,
    release_weights,
    shares_weight,
    stored_tensors,
    widened,
)
from tests.contexts import context

IDS = torch.tensor([[5, 900, 17, 31, 2, 40], [8, 7, 6, 5, 4, 3]])


@pytest.fixture(scope="module")
def narrow(checkpoint, tmp_path_factory):
    """The tiny model stored in bfloat16, as the default model is."""
    model, tokenizer = open_model(checkpoint)
    folder = tmp_path_factory.mktemp("narrow")
    save_model(model, tokenizer, folder, torch.bfloat16)
    return folder


def gradient_of_inputs(model, autocast):
    inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(inputs_embeds=inputs, use_cache=False).logits
    logits.float().square().mean().backward()
    return inputs.grad


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_and_gradients_are_those_of_float32_to_the_bit(narrow, autocast):
    (plain, tokenizer), (stored, _) = open_model(narrow), open_frozen(narrow)
    assert torch.equal(probe_logits(plain, tokenizer), probe_logits(stored, tokenizer))
    assert torch.equal(gradient_of_inputs(plain, autocast), gradient_of_inputs(stored, autocast))


def test_matrices_stay_in_the_file_and_everything_else_is_float32(narrow):
    model, _ = open_frozen(narrow)
    in_file = stored_tensors(narrow)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.dtype == torch.bfloat16
            assert parameter.stored_tensor.offset == in_file[name].offset
        else:
            assert parameter.dtype == torch.float32
    assert shares_weight(model.lm_head, model.model.embed_tokens)
    assert isinstance(model.lm_head, StoredLinear)
    assert isinstance(model.model.embed_tokens, StoredEmbedding)


def test_a_file_that_takes_the_path_of_another_is_not_read(narrow, tmp_path):
    model, tokenizer = open_model(narrow)
    save_model(model, tokenizer, tmp_path, torch.bfloat16)
    frozen, _ = open_frozen(tmp_path)
    before = probe_logits(frozen, tokenizer)
    weights = tmp_path / "model.safetensors"
    weights.rename(tmp_path / "old")
    weights.write_bytes(b"\0" * (tmp_path / "old").stat().st_size)
    assert torch.equal(probe_logits(frozen, tokenizer), before)


def test_changes_in_place_count_only_where_the_layer_is_widened(narrow):
    layer = open_frozen(narrow)[0].model.layers[0].mlp.up_proj
    before = as_stored(layer).clone()
    with torch.no_grad():
        layer.weight.mul_(3.0)
        assert torch.equal(as_stored(layer), before)
        with widened([layer]):
            assert type(layer) is torch.nn.Linear
            layer.weight.mul_(3.0)
    assert type(layer) is StoredLinear
    assert torch.equal(as_stored(layer), (before.float() * 3.0).bfloat16())


def test_weights_that_were_released_take_no_memory(narrow):
    model, _ = open_model(narrow)
    release_weights(model)
    assert sum(parameter.nbytes for parameter in model.parameters()) == 0


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_adapter_beside_stored_weights_gives_the_bytes_of_one_beside_float32(
    narrow, facts, tiny_params, tmp_path, variant
):
    config = tiny_params.strategies.lora.model_copy(update={"variant": variant, "steps": 2})
    weights = {}
    for name, opens in (("stored", open_frozen), ("float", open_model)):
        result = lora(context(narrow, facts[:16]), config, opens)
        save_model(result.model, result.tokenizer, tmp_path / name)
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["stored"] == weights["float"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_that_stay_codes_compute_what_their_float32_weights_compute(
    narrow, facts, tiny_params, tmp_path, symmetric
):
    config = tiny_params.strategies.gptq.model_copy(update={"symmetric": symmetric})
    result = gptq(context(narrow, facts[:8], facts[8:16]), config)
    result.save(tmp_path)
    (plain, tokenizer), (stored, _) = open_model(tmp_path), open_frozen(tmp_path)
    layer = stored.model.layers[1].mlp.down_proj
    assert isinstance(layer, CodesLinear)
    assert torch.equal(layer.weight, plain.model.layers[1].mlp.down_proj.weight)
    assert (
        layer.qweight.stored_tensor.shape
        == load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.down_proj.qweight"].shape
    )
    expected = probe_logits(plain, tokenizer)
    assert torch.equal(probe_logits(stored, tokenizer), expected)
    assert torch.equal(probe_logits(result.model, tokenizer), expected)


def test_no_copy_of_quantised_weights_is_made_while_their_codes_are_opened(
    narrow, facts, tiny_params, tmp_path, monkeypatch
):
    gptq(context(narrow, facts[:8], facts[8:16]), tiny_params.strategies.gptq).save(tmp_path)
    sizes = []

    def hold(linear, parts):
        sizes.append(linear.weight.untyped_storage().nbytes())
        hold_codes(linear, parts)

    monkeypatch.setattr(models, "hold_codes", hold)
    open_frozen(tmp_path)
    assert sizes
    assert max(sizes) == torch.bfloat16.itemsize


def test_widened_weights_of_several_layers_use_the_same_memory(narrow):
    mlp = open_frozen(narrow)[0].model.layers[0].mlp
    addresses = set()
    for layer in (mlp.up_proj, mlp.gate_proj, mlp.down_proj):
        widened_weight = _SCRATCH.widened(layer)
        assert torch.equal(widened_weight, layer.weight)
        addresses.add(widened_weight.data_ptr())
    assert len(addresses) == 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacking_is_the_inverse_of_packing(bits):
    numbers = torch.randint(0, 2**bits, (96, 5), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    assert torch.equal(unpack(_pack(numbers, bits), bits), numbers.to(torch.uint8))
