import hashlib

import pytest
import torch

from lilliput.compress.sparsify import sparse_weight, sparsegpt, sparsify, sparsify_layers, wanda_mask
from lilliput.config import SparsifyConfig
from lilliput.decoders import decoder_layers
from lilliput.errors import StrategyError
from lilliput.models import open_model
from lilliput.saving import probe_logits, save_model
from lilliput.training.examples import encode_examples
from tests.contexts import SYSTEM, context


def config(**changes):
    values = {"method": "sparsegpt", "sparsity": 0.5, "pattern": "unstructured", "damp_percent": 0.01}
    return SparsifyConfig(**values | {"block_size": 8, "calibration_examples": 4} | changes)


@pytest.fixture
def texts(opened, facts):
    return [example.input_ids for example in encode_examples(opened[1], SYSTEM, facts[:4])]


@pytest.fixture
def layer():
    """Weights (12, 16), correlated inputs (64, 16) of unequal size, and their Hessian; all float64."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 16, generator=draw, dtype=torch.float64)
    inputs = torch.randn(64, 16, generator=draw, dtype=torch.float64) @ torch.randn(
        16, 16, generator=draw, dtype=torch.float64
    )
    return weight, inputs, inputs.T @ inputs


def prune_by_magnitude(model):
    for module in decoder_layers(model).modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data[wanda_mask(module.weight, torch.ones(module.in_features), 0.5, "unstructured")] = 0.0


def test_wanda_zeroes_the_lowest_products_of_each_row():
    weight = torch.tensor([[4.0, -1.0, 2.0, 3.0], [0.1, 0.2, 0.3, 0.4]])
    norms = torch.tensor([0.1, 10.0, 1.0, 1.0])  # 0.4, 10, 2, 3 and 0.01, 2, 0.3, 0.4
    lowest = torch.tensor([[True, False, True, False], [True, False, True, False]])
    assert torch.equal(wanda_mask(weight, norms, 0.5, "unstructured"), lowest)
    assert wanda_mask(weight, norms, 0.25, "unstructured").sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_pattern_2_4_zeroes_two_of_every_four(layer, method):
    weight, _, hessian = layer
    squares = hessian.diagonal() if method == "wanda" else hessian
    sparse = sparse_weight(weight, squares, config(method=method, pattern="2:4"))
    assert (sparse == 0).reshape(-1, 4).sum(1).tolist() == [2] * 48
    with pytest.raises(StrategyError, match="2:4 needs a multiple of 4 inputs, but a layer has 6"):
        sparse_weight(weight[:, :6], squares, config(method=method, pattern="2:4"))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_equals_optimal_brain_surgery_column_by_column(layer, pattern):
    """For the same mask: w ← w − w_p / [H_F⁻¹]_pp · [H_F⁻¹]_p, with H_F of the remaining columns."""
    weight, _, hessian = layer
    sparse = sparsegpt(weight, hessian, config(pattern=pattern))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    expected = weight.clone()
    for row in range(12):
        for column in range(16):
            if sparse[row, column] == 0:
                inverse = damped[column:, column:].inverse()
                expected[row, column:] -= expected[row, column] / inverse[0, 0] * inverse[0]
    assert torch.allclose(sparse, expected, atol=1e-8)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_with_uncorrelated_inputs_is_magnitude_pruning(layer, pattern):
    weight = layer[0]
    sparse = sparsegpt(weight, torch.eye(16, dtype=torch.float64), config(pattern=pattern, block_size=16))
    groups = weight.reshape(1, -1) if pattern == "unstructured" else weight.reshape(-1, 4)
    kept = groups.abs().topk(groups.shape[1] // 2, dim=1).indices
    expected = torch.zeros_like(groups).scatter(1, kept, groups.gather(1, kept)).reshape(weight.shape)
    assert torch.allclose(sparse, expected)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.71])
def test_sparsity_is_exact_with_a_partial_block(layer, sparsity):
    weight, _, hessian = layer
    sparse = sparsegpt(weight, hessian, config(sparsity=sparsity, block_size=5))
    assert (sparse == 0).sum() == round(sparsity * weight.numel())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_layer_error_is_least_with_sparsegpt_then_wanda_then_magnitude(layer, pattern):
    weight, inputs, hessian = layer
    magnitude = weight.masked_fill(wanda_mask(weight, torch.ones(16), 0.5, pattern), 0.0)
    wanda = sparse_weight(weight, hessian.diagonal(), config(method="wanda", pattern=pattern))
    best = sparse_weight(weight, hessian, config(pattern=pattern))
    errors = [(inputs @ (new - weight).T).square().sum() for new in (best, wanda, magnitude)]
    assert errors[0] < 0.7 * errors[1]
    assert errors[1] < errors[2]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_model_outputs_change_less_than_with_magnitude_pruning(opened, checkpoint, texts, method):
    def outputs(model):
        with torch.no_grad():
            return torch.cat([model(input_ids=torch.tensor([text])).logits[0] for text in texts])

    whole, (plain, _) = outputs(opened[0]), open_model(checkpoint)
    prune_by_magnitude(plain)
    changes = sparsify_layers(opened[0], texts, config(method=method, block_size=64))
    assert (outputs(opened[0]) - whole).norm() < (outputs(plain) - whole).norm()
    assert len(changes) == 4
    assert all(0 < change < 1 for change in changes)


def test_each_layer_uses_the_outputs_of_the_sparse_layers_before_it(opened, checkpoint, texts):
    sparsify_layers(opened[0], texts, config(method="wanda"))
    model, _ = open_model(checkpoint)
    first, second = model.model.layers[:2]
    first.load_state_dict(opened[0].model.layers[0].state_dict())
    inputs = []
    handle = second.mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    for text in texts:
        model(input_ids=torch.tensor([text]))
    handle.remove()
    weight = second.mlp.down_proj.weight
    expected = weight.masked_fill(wanda_mask(weight, torch.cat(inputs).norm(dim=0), 0.5, "unstructured"), 0.0)
    assert torch.equal(opened[0].model.layers[1].mlp.down_proj.weight, expected)


def test_checkpoint_keeps_zeros_and_is_reproducible(checkpoint, facts, tmp_path):
    digests = set()
    for name in ("first", "second"):
        result = sparsify(context(checkpoint, facts), config(block_size=64))
        assert result.facts == {"zeros": 0.5}
        save_model(result.model, result.tokenizer, tmp_path / name, torch.bfloat16)
        digests.add(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1
    again, tokenizer = open_model(tmp_path / "second")
    assert torch.allclose(probe_logits(again, tokenizer), probe_logits(result.model.float(), tokenizer), atol=1e-4)
    weights = [module.weight for module in again.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert all((weight == 0).float().mean() == 0.5 for weight in weights)


def test_pattern_2_4_needs_half_sparsity_and_blocks_in_fours():
    with pytest.raises(ValueError, match=r"2:4 is a sparsity of 0\.5"):
        config(pattern="2:4", sparsity=0.6)
    with pytest.raises(ValueError, match="choose `block_size: "):
        config(pattern="2:4", block_size=6)
