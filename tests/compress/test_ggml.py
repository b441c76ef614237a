import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from torch.nn import Linear

from lilliput.compile.gguf import compile_gguf
from lilliput.compress.ggml import ggml
from lilliput.compress.importance import mean_squared_inputs
from lilliput.compress.mixed import _second_moments
from lilliput.compress.packing import linears
from lilliput.config import GgmlConfig, GgufTarget
from lilliput.errors import StrategyError
from lilliput.ggml.blocks import read_blocks
from lilliput.ggml.quantiser import quantise
from lilliput.models import open_frozen, open_model
from lilliput.packed_texts import pack_texts
from lilliput.training.examples import encode_examples
from tests.contexts import SYSTEM, context, saved, weights_of


@pytest.fixture
def made(checkpoint, facts, tmp_path):
    """Applies the strategy to the tiny model; returns the result and the folder of its checkpoint."""

    def make(**settings):
        config = GgmlConfig(**{"calibration_examples": 8} | settings)
        result = ggml(context(checkpoint, facts[:8], facts[:2]), config)
        folder = tmp_path / f"{config.type}-{config.importance}"
        assert result.save is not None
        result.save(folder)
        return result, folder

    return make


def test_importance_is_the_mean_square_that_mixed_precision_uses(opened, facts):
    model, tokenizer = opened
    texts = [example.input_ids for example in encode_examples(tokenizer, SYSTEM, facts[:8])]
    expected, _ = _second_moments(model, texts)
    found = mean_squared_inputs(model, pack_texts(texts, model.config, batch_tokens=256))
    assert found.keys() == expected.keys() == linears(model).keys()
    for name, values in found.items():
        assert np.allclose(values, expected[name].numpy(), rtol=1e-4)


@pytest.mark.parametrize("importance", [True, False])
def test_checkpoint_holds_the_blocks_of_ggml_and_opens_as_the_model_in_memory(made, opened, facts, importance):
    result, folder = made(type="Q4_0", importance=importance)
    model, tokenizer = opened
    texts = [example.input_ids for example in encode_examples(tokenizer, SYSTEM, facts[:8])]
    inputs = mean_squared_inputs(model, pack_texts(texts, model.config, batch_tokens=8192)) if importance else {}
    stored = dict(read_blocks(folder))
    assert stored.keys() == {*linears(model), "model.embed_tokens"}
    for name, blocks in stored.items():
        weight = model.get_submodule(name).weight.detach().numpy()
        assert np.array_equal(blocks.data, quantise(weight, blocks.kind, inputs.get(name))), name
    for opens in (open_model, open_frozen):
        again = weights_of(opens(folder)[0])
        assert again.keys() == weights_of(result.model).keys()
        assert all(torch.equal(weight, again[name]) for name, weight in weights_of(result.model).items())
    assert result.facts["matrices_by_type"] == {"Q4_0": 28, "Q8_0": 1}
    assert result.facts["other_types_for_width"] == 1  # the table: Q6_K if it were wider
    assert 4.5 < result.facts["bits"] < 8.5
    assert ("calibration_tokens" in result.facts) == importance


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q5_1"])
def test_compiled_file_has_the_evaluated_weights_to_the_bit(made, tmp_path, name):
    """The compiled file decodes to a float file of the evaluated weights, which has llama.cpp's order of rows."""
    result, folder = made(type=name)
    evaluated = saved(*open_model(folder), tmp_path / "evaluated")
    files = {}
    for place, floats in ((folder, "f16"), (evaluated, "f32")):
        target = tmp_path / f"{place.name}-gguf"
        target.mkdir()
        done = compile_gguf(place, target, GgufTarget(candidate="c", target="gguf", floats=floats, embeddings=floats))
        files[place] = gguf.GGUFReader(target / "model.gguf")
        assert done["largest_weight_difference"] == 0
    kinds = {tensor.tensor_type.name for tensor in files[folder].tensors}
    assert kinds == {"F32", *result.facts["matrices_by_type"]}
    assert files[folder].fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{name}"]
    decoded = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in files[folder].tensors}
    floats = {tensor.name: np.asarray(tensor.data) for tensor in files[evaluated].tensors}
    assert decoded.keys() == floats.keys()
    assert all(np.array_equal(decoded[tensor], floats[tensor]) for tensor in decoded)


def test_importance_lowers_the_weighted_error(made, opened, facts):
    model, tokenizer = opened
    texts = [example.input_ids for example in encode_examples(tokenizer, SYSTEM, facts[:8])]
    importance = mean_squared_inputs(model, pack_texts(texts, model.config, batch_tokens=8192))
    originals = {name: linear.weight.detach().numpy().copy() for name, linear in linears(model).items()}

    def error(folder) -> float:
        stored = dict(read_blocks(folder))
        return sum(
            float(((stored[name].weight() - weight) ** 2 @ importance[name]).sum())
            for name, weight in originals.items()
        )

    weighted, plain = (made(type="IQ4_NL", importance=chosen)[1] for chosen in (True, False))
    assert error(weighted) < 0.99 * error(plain)


def test_same_inputs_give_the_same_bytes(made, tmp_path):
    first = made(type="Q4_1")[1].rename(tmp_path / "first")
    second = made(type="Q4_1")[1]
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_type_for_wider_rows_is_rejected_or_written_as_llama_cpp_would(made):
    with pytest.raises(StrategyError, match="type Q4_K_M needs rows of a multiple of 256 weights, but layers have 64"):
        made(type="Q4_K_M")
    result, folder = made(type="Q4_K_M", other_widths="fallback")
    assert result.facts["other_types_for_width"] == 28  # the table's Q8_0 is the rule for its width
    assert {blocks.kind for _, blocks in read_blocks(folder)} == {Type.Q5_0, Type.Q8_0}


def test_a_layer_that_the_rules_do_not_cover_is_rejected(opened, facts, tmp_path, monkeypatch):
    model, tokenizer = opened
    model.model.layers[0].mlp.extra = Linear(64, 64)
    monkeypatch.setattr("lilliput.compress.ggml.open_model", lambda _: (model, tokenizer))
    with pytest.raises(StrategyError, match=r"model\.layers\.0\.mlp\.extra: which type llama.cpp gives this layer"):
        ggml(context(tmp_path, facts[:8], facts[:2]), GgmlConfig())


def test_types_that_need_importance_are_rejected_without_it():
    for name in ("IQ2_S", "IQ2_M", "Q2_K_S"):
        with pytest.raises(ValueError, match=f"`type: {name}` needs `importance: true`"):
            GgmlConfig(type=name, importance=False)
