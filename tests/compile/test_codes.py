import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lilliput.codes import _pack_bits, _unpack_bits, has_codes, read_codes
from lilliput.errors import ArtifactError, CompileError
from lilliput.foreign_gptq import open_with_gptqmodel
from lilliput.models import open_codes, open_model


@given(
    st.sampled_from([2, 3, 4, 8]).flatmap(
        lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), min_size=32, max_size=32))
    )
)
def test_unpacking_inverts_packing(case):
    bits, numbers = case
    packed = _pack_bits(np.array(numbers, dtype=np.uint8), bits)
    assert _unpack_bits(packed[None], bits)[0].tolist() == numbers


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(4, True), (4, False), (8, False), pytest.param(3, False, marks=pytest.mark.slow)]
)
def test_codes_give_exactly_the_weights_of_gptqmodel(quantised, bits, symmetric):
    folder = quantised(bits, 32, symmetric)
    model = open_with_gptqmodel(folder)
    layers = dict(read_codes(folder))
    assert len(layers) == 4 * 7
    for name, codes in layers.items():
        assert (codes.bits, codes.group_size, codes.symmetric) == (bits, 32, symmetric)
        np.testing.assert_array_equal(codes.weight(), model.state_dict()[f"{name}.weight"].numpy())
        np.testing.assert_array_equal(codes.in_groups_of(16).weight(), codes.weight())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_model_opens_from_its_codes_exactly_as_with_gptqmodel(quantised, symmetric):
    folder = quantised(4, 32, symmetric)
    ours, theirs = open_codes(folder), open_with_gptqmodel(folder)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(weight, theirs.state_dict()[name]) for name, weight in ours.state_dict().items())
    ids = torch.arange(3, 40)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    ends = [model.generation_config.eos_token_id for model in (ours, theirs)]
    assert ends[0] == ends[1] is not None


def test_a_layer_may_be_divided_among_files(quantised, tmp_path):
    folder = shutil.copytree(quantised(), tmp_path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((".scales", "")):
        names = [name for name in tensors if name.endswith(part)]
        shard = {name: tensors.pop(name) for name in names}
        save_file(shard, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
    whole, divided = open_model(quantised())[0].state_dict(), open_model(folder)[0].state_dict()
    assert whole.keys() == divided.keys()
    assert all(torch.equal(weight, divided[name]) for name, weight in whole.items())


def test_a_checkpoint_with_missing_weights_does_not_open(quantised, tmp_path):
    folder = shutil.copytree(quantised(), tmp_path / "incomplete")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"1 weights are missing, for example model\.norm\.weight"):
        open_model(folder)


def test_a_float_checkpoint_has_no_codes(checkpoint):
    assert list(read_codes(checkpoint)) == []
    assert not has_codes(checkpoint)


def test_reordered_groups_are_rejected(quantised, tmp_path):
    folder = shutil.copytree(quantised(), tmp_path / "ordered")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.g_idx"] = tensors["model.layers.0.mlp.up_proj.g_idx"][::-1].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompileError, match=r"up_proj: .*act_order: false"):
        list(read_codes(folder))
    assert not has_codes(folder)


def test_another_format_is_rejected(quantised, tmp_path):
    folder = shutil.copytree(quantised(), tmp_path / "v2")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompileError, match="gptq_v2"):
        list(read_codes(folder))
    assert not has_codes(folder)
