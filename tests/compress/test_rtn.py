import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import MixtralConfig

from lilliput.compress.grid import Grid, rounded
from lilliput.compress.packing import require_packable
from lilliput.compress.rtn import rtn
from lilliput.config import RtnConfig
from lilliput.errors import StrategyError
from lilliput.models import open_model, random_model
from tests.contexts import context, weights_of


def nearest(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> torch.Tensor:
    """A plain formula for rounding to nearest; the file stores scales in float16."""
    groups = weight.reshape(weight.shape[0], -1, group_size)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        scale = (groups.abs().amax(-1, keepdim=True) * 2 / (2**bits - 1)).half().float()
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        scale = ((high - low) / (2**bits - 1)).half().float()
        zero = (-low / scale).round()
    codes = ((groups / scale).round() + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(weight.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_grid_equals_rounding_to_nearest(bits, symmetric):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(5))
    expected = nearest(weight, bits, 16, symmetric)
    torch.testing.assert_close(rounded(weight, Grid(bits, 16, symmetric)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False)])
@pytest.mark.slow
def test_reopened_checkpoint_is_the_rounded_float_model(checkpoint, facts, tmp_path, bits, symmetric):
    result = rtn(context(checkpoint, held_out=facts[:2]), RtnConfig(bits=bits, group_size=32, symmetric=symmetric))
    result.save(tmp_path)
    original, reopened = open_model(checkpoint)[0], open_model(tmp_path)[0]
    torch.testing.assert_close(weights_of(reopened), weights_of(result.model), rtol=0, atol=1e-6)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.3.mlp.down_proj"):
        expected = nearest(original.get_submodule(name).weight, bits, 32, symmetric)
        torch.testing.assert_close(reopened.get_submodule(name).weight, expected, rtol=0, atol=1e-7)
    assert torch.equal(reopened.model.embed_tokens.weight, original.model.embed_tokens.weight)
    assert json.loads((tmp_path / "quantize_config.json").read_text())["checkpoint_format"] == "gptq"


@pytest.mark.slow
def test_same_parent_same_bytes(checkpoint, facts, tmp_path):
    config = RtnConfig(bits=4, group_size=32, symmetric=False)
    hashes = set()
    for name in ("one", "two"):
        rtn(context(checkpoint, held_out=facts[:2]), config).save(tmp_path / name)
        files = sorted((tmp_path / name).iterdir())
        hashes.add(tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
    assert len(hashes) == 1


def test_rejects_experts_that_are_not_linear_layers():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    mixture = random_model(MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=4, **shape), seed=1)
    with pytest.raises(StrategyError, match=r"most weights of the parent's decoder layers are not in linear layers"):
        require_packable(mixture, RtnConfig(bits=4, group_size=16, symmetric=False))


def test_rejects_layers_that_three_bits_cannot_pack():
    model = SimpleNamespace(model=SimpleNamespace(layers=torch.nn.ModuleList([torch.nn.Linear(64, 48)])))
    model.named_modules = lambda: [("layer", model.model.layers[0])]
    with pytest.raises(StrategyError, match="3-bit codes are packed 32 at a time, which does not divide layers of 48"):
        require_packable(model, RtnConfig(bits=3, group_size=32, symmetric=False))
    require_packable(model, RtnConfig(bits=4, group_size=32, symmetric=False))


def test_rejects_a_group_size_that_divides_no_layer(checkpoint, facts):
    with pytest.raises(StrategyError, match="128 does not divide"):
        rtn(context(checkpoint, held_out=facts[:2]), RtnConfig(bits=4, group_size=128, symmetric=False))
