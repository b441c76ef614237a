import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from transformers import Qwen3Config

from lilliput.codes import Codes, read_codes
from lilliput.compile.gguf import compile_gguf, encode
from lilliput.compress.experts import mixture_of
from lilliput.config import GgufTarget
from lilliput.errors import ArtifactError, CompileError
from lilliput.models import open_model, random_model
from lilliput.saving import save_model


def config(**settings):
    return GgufTarget(candidate="small", target="gguf", **settings)


def read(folder):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


def values(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def codes(bits=4, symmetric=True, group_size=32, outputs=6, inputs=128):
    rng = np.random.default_rng(7)
    groups = inputs // group_size
    zeros = np.full((outputs, groups), 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, (outputs, groups))
    drawn = rng.integers(0, 1 << bits, (outputs, inputs)).astype(np.uint8)
    return Codes(drawn, rng.uniform(0.01, 0.1, (outputs, groups)).astype(np.float16), zeros.astype(np.uint8), bits)


@pytest.mark.parametrize(("bits", "kind"), [(2, "Q4_0"), (3, "Q4_0"), (4, "Q4_0"), (8, "Q8_0")])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_symmetric_codes_give_the_same_weights_in_gguf(bits, kind, group_size):
    packed = codes(bits, group_size=group_size)
    actual, data = encode(packed)
    assert actual.name == kind
    np.testing.assert_array_equal(gguf.quants.dequantize(data, actual), packed.weight())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_asymmetric_codes_differ_only_by_the_rounding_of_their_offset(bits):
    packed = codes(bits, symmetric=False)
    kind, data = encode(packed)
    steps = packed.scales.astype(np.float32).repeat(32, axis=1)
    assert kind.name == "Q4_1"
    assert (np.abs(gguf.quants.dequantize(data, kind) - packed.weight()) <= 15 * 2.0**-11 * steps).all()


def test_codes_without_a_gguf_type_are_rejected():
    with pytest.raises(CompileError, match="symmetric: true"):
        encode(codes(8, symmetric=False))
    with pytest.raises(CompileError, match="groups of 32"):
        encode(codes(group_size=16))


@pytest.fixture(scope="module")
def compiled(quantised, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return folder, compile_gguf(quantised(), folder, config())


def test_a_quantised_checkpoint_keeps_its_codes(compiled, quantised):
    folder, facts = compiled
    tensors = read(folder)
    assert facts["largest_weight_difference"] == 0.0
    assert facts["tensors"] == {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert facts["tensors_by_type"] == {"F32": 9, "Q4_0": 28, "Q8_0": 1}
    layers = dict(read_codes(quantised()))
    np.testing.assert_array_equal(
        values(tensors["blk.2.ffn_down.weight"]), layers["model.layers.2.mlp.down_proj"].weight()
    )
    # llama.cpp reorders the rows of queries and keys.
    query = layers["model.layers.1.self_attn.q_proj"].weight()
    np.testing.assert_array_equal(np.sort(values(tensors["blk.1.attn_q.weight"]), axis=0), np.sort(query, axis=0))


def test_the_file_has_its_shape_and_chat_template(compiled):
    fields = gguf.GGUFReader(compiled[0] / "model.gguf").fields
    assert fields["llama.attention.head_count_kv"].contents() == 2
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert "<|im_start|>" in fields["tokenizer.chat_template"].contents()


def test_float_weights_are_exact_in_float32(checkpoint, tmp_path):
    compile_gguf(checkpoint, tmp_path, config(floats="f32", embeddings="f32"))
    model, _ = open_model(checkpoint)
    tensors = read(tmp_path)
    np.testing.assert_array_equal(
        values(tensors["token_embd.weight"]), model.model.embed_tokens.weight.detach().numpy()
    )
    np.testing.assert_array_equal(
        values(tensors["blk.0.ffn_up.weight"]), model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    )


def test_code_and_pickles_are_rejected(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": "evil.py"}}))
    with pytest.raises(ArtifactError, match="auto_map"):
        compile_gguf(folder, tmp_path, config())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CompileError, match="safetensors"):
        compile_gguf(folder, tmp_path, config())


def test_another_model_family_keeps_its_weights(tokenizer, tmp_path):
    """The converter's module for Qwen refers to tensors that the released gguf does not know."""
    shape = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = random_model(shape, seed=0)
    save_model(model, tokenizer, tmp_path)
    compile_gguf(tmp_path, tmp_path, config(floats="f32", embeddings="f32"))
    np.testing.assert_array_equal(
        values(read(tmp_path)["blk.1.ffn_gate.weight"]), model.model.layers[1].mlp.gate_proj.weight.detach().numpy()
    )


def test_a_merged_mixture_keeps_its_experts_and_routers(opened, tmp_path):
    mixture = mixture_of(opened, 3)
    for layer in mixture.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, generator=torch.Generator().manual_seed(0))
    save_model(mixture, opened[1], tmp_path)
    compile_gguf(tmp_path, tmp_path, config(floats="f32", embeddings="f32"))
    tensors, layer = read(tmp_path), mixture.model.layers[1].mlp
    gate, _ = layer.experts.gate_up_proj.detach().chunk(2, dim=1)
    np.testing.assert_array_equal(values(tensors["blk.1.ffn_gate_exps.weight"]), gate.numpy())
    np.testing.assert_array_equal(values(tensors["blk.1.ffn_gate_inp.weight"]), layer.gate.weight.detach().numpy())


def test_an_unsupported_tokenizer_is_an_error(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(CompileError, match="converter does not support this model: BPE pre-tokenizer"):
        compile_gguf(folder, tmp_path, config())


def test_an_unknown_architecture_is_an_error_with_its_name(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"architectures": ["HomemadeForCausalLM"]}))
    with pytest.raises(CompileError, match="HomemadeForCausalLM"):
        compile_gguf(folder, tmp_path, config())
