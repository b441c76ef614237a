import hashlib

import pytest
import torch
from torch.nn import Linear
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lilliput.compress.awq import Group, _best_scales, awq, fold, scale_model
from lilliput.compress.grid import Grid, rounded
from lilliput.config import AwqConfig
from lilliput.errors import StrategyError
from lilliput.models import open_model, random_model
from lilliput.saving import probe_logits
from lilliput.training.examples import encode_examples
from tests.contexts import SYSTEM, context, weights_of

CONFIG = AwqConfig(bits=3, group_size=32, symmetric=False, calibration_examples=16, scale_steps=10)


def texts_of(tokenizer, facts):
    return [example.input_ids for example in encode_examples(tokenizer, SYSTEM, facts)]


def test_scaling_keeps_the_outputs_of_the_float_model(opened, facts):
    model, tokenizer = opened
    before, weight = probe_logits(model, tokenizer), model.model.layers[1].mlp.up_proj.weight.detach().clone()
    scale_model(model, texts_of(tokenizer, facts), CONFIG, torch.bfloat16)
    assert (probe_logits(model, tokenizer) - before).abs().max() < 1e-4 * before.abs().max()
    assert (model.model.layers[1].mlp.up_proj.weight - weight).abs().max() > 0.01
    norm = model.model.layers[1].input_layernorm.weight
    assert torch.equal(norm, norm.bfloat16().float())


def test_scaling_works_without_grouped_query_attention(tokenizer, facts):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=4, initializer_range=0.2, **shape)
    model = random_model(config, seed=3).eval()
    before, weight = probe_logits(model, tokenizer), model.model.layers[0].self_attn.o_proj.weight.detach().clone()
    scale_model(model, texts_of(tokenizer, facts[:8]), CONFIG, torch.float32)
    assert (probe_logits(model, tokenizer) - before).abs().max() < 1e-4 * before.abs().max()
    assert (model.model.layers[0].self_attn.o_proj.weight - weight).abs().max() > 0.01


def test_best_scales_have_the_least_output_error():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 64, generator=generator)
    x[:, [5, 40]] *= 20.0
    reader = Linear(64, 32, bias=False)
    reader.weight.data = torch.randn(32, 64, generator=generator)
    scales, plain, best = _best_scales(Group(torch.nn.Identity(), [reader]), x.T @ x / 400, x.abs().mean(0), CONFIG)
    weight, errors = reader.weight.detach(), []
    for step in range(10):
        s = x.abs().mean(0) ** (step / 10)
        scaled = rounded(weight * s, Grid(3, 32, symmetric=False)) / s  # a common factor of s has no effect
        errors.append(((x @ (scaled - weight).T) ** 2).sum().item() / 400)
    assert plain == pytest.approx(errors[0], rel=1e-3)
    assert best == pytest.approx(min(errors), rel=1e-3)
    assert best < 0.8 * plain  # a few channels carry the output
    step = min(range(10), key=errors.__getitem__)
    expected = x.abs().mean(0) ** (step / 10)
    torch.testing.assert_close(scales / scales[0], expected / expected[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("writer", [LlamaRMSNorm(8), Linear(4, 8)])
def test_folding_is_exact_with_rounded_norms(writer):
    generator = torch.Generator().manual_seed(2)
    readers = [Linear(8, 3), Linear(8, 5)]
    x = torch.randn(6, writer.weight.shape[-1], generator=generator)
    before = [reader(writer(x)) for reader in readers]
    fold(Group(writer, readers), torch.rand(8, generator=generator) + 0.5, torch.bfloat16)
    for reader, expected in zip(readers, before, strict=True):
        torch.testing.assert_close(reader(writer(x)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_reopened_checkpoint_is_the_scaled_and_rounded_model(checkpoint, facts, tmp_path):
    result = awq(context(checkpoint, facts, facts[:2]), CONFIG)
    result.save(tmp_path)
    reopened = open_model(tmp_path)[0]
    torch.testing.assert_close(weights_of(reopened), weights_of(result.model), rtol=0, atol=1e-6)
    scaled, tokenizer = open_model(checkpoint)
    scale_model(scaled, texts_of(tokenizer, facts[:16]), CONFIG, torch.float32)
    name = "model.layers.2.mlp.down_proj"
    expected = rounded(scaled.get_submodule(name).weight.detach(), Grid(3, 32, symmetric=False))
    torch.testing.assert_close(reopened.get_submodule(name).weight, expected, rtol=1e-3, atol=1e-6)
    assert result.facts["error_against_rounding"] < 1.0
    assert [layer for layer, _ in result.history["awq_layer_error"]] == [0, 1, 2, 3]
    again = tmp_path / "again"
    awq(context(checkpoint, facts, facts[:2]), CONFIG).save(again)
    hashes = {hashlib.sha256((f / "model.safetensors").read_bytes()).hexdigest() for f in (tmp_path, again)}
    assert len(hashes) == 1


def test_rejects_layers_unlike_llama(opened, facts):
    model, tokenizer = opened
    del model.model.layers[2].mlp.gate_proj
    with pytest.raises(StrategyError, match=r"lack a part of Llama's layers, gate_proj.*choose gptq or rtn"):
        scale_model(model, texts_of(tokenizer, facts[:1]), CONFIG, torch.float32)


def test_rejects_norms_that_add_one_to_their_weight(checkpoint, facts, monkeypatch):
    def forward(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:]) * (1.0 + self.weight)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    with pytest.raises(StrategyError, match="do not compute what Llama's do"):
        awq(context(checkpoint, facts, facts[:2]), CONFIG)
