"""Every key and tensor of a GGUF file is used by the model, or stops the load with its name."""

import gguf
import numpy as np
import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Qwen2Config

from lilliput.compress import load as load_module
from lilliput.compress.load import load
from lilliput.config import LoadConfig
from lilliput.errors import SourceError
from lilliput.gguf_source.header import parsed_once, read_header
from lilliput.gguf_source.opening import gguf_config, open_gguf
from lilliput.gguf_source.runtime_check import llama_cpp_outcome, probe_ids, require_same_model
from tests.contexts import context
from tests.gguf_source.conftest import perturbed, write_gguf

# transformers adds its own end token to some GGUF vocabularies; `load` removes it with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*added tokens have no row in the embedding table:UserWarning")
LOAD = LoadConfig(dtype="float32")
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
IDS = torch.randint(0, 298, (1, 200), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def write(tmp_path):
    """Writes a tiny Llama with changed hyperparameters and tensors; returns (model, file)."""

    def make(settings=(), extra=(), architecture="llama", config=None):
        model = perturbed(config or LlamaConfig(**SHAPE))
        return model, write_gguf(tmp_path / "model.gguf", model, architecture, dict(settings), dict(extra))

    return make


def opened(file):
    header = read_header(file)
    return open_gguf(header, gguf_config(header)).eval()


@torch.inference_mode()
def test_missing_hyperparameters_have_llama_cpp_s_defaults(write):
    model, file = write({"attention.head_count_kv": 1, "rope.freq_base": None})
    torch.testing.assert_close(opened(file)(IDS).logits, model(IDS).logits, rtol=0.0, atol=1e-4)


def test_a_block_parses_a_file_once_with_the_same_result(write, monkeypatch):
    file, plain, parsed = write()[1], gguf.GGUFReader, []
    outside = read_header(file)

    class Counting(plain):
        def __init__(self, path):
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    with parsed_once():
        inside = read_header(file)
        model = open_gguf(inside, gguf_config(inside)).eval()
    assert parsed == [file.absolute()]
    assert gguf.GGUFReader is Counting
    assert inside.settings == outside.settings
    assert all(np.array_equal(inside.tensors[name].data, tensor.data) for name, tensor in outside.tensors.items())
    monkeypatch.undo()
    assert all(
        torch.equal(weight, other) for weight, other in zip(model.parameters(), opened(file).parameters(), strict=True)
    )


SCALED = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
KNOWN = {
    "base": ({"rope.freq_base": 500.0}, {"rope_type": "default", "rope_theta": 500.0}),
    "linear": (SCALED, {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}),
    "yarn": (
        SCALED | {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 512},
        {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 512},
    ),
}


@pytest.mark.parametrize("name", KNOWN)
@torch.inference_mode()
def test_rotary_embeddings_follow_the_file(name, write):
    settings, parameters = KNOWN[name]
    model, file = write(settings, config=LlamaConfig(**SHAPE, rope_parameters=parameters))
    torch.testing.assert_close(opened(file)(IDS).logits, model(IDS).logits, rtol=0.0, atol=1e-4)


REJECTED = {
    "mystery": {"mystery": 3},
    "attention.sliding_window": {"attention.sliding_window": 32},
    "attention.causal": {"attention.causal": False},
    "pooling_type": {"pooling_type": 1},
    "attention.head_count_kv differs": {"attention.head_count_kv": [1, 2]},
    "feed_forward_length differs": {"feed_forward_length": [64, 32]},
    "attention.value_length": {"attention.value_length": 16},
    "attention.scale": {"attention.scale": 0.5},
    "final_logit_softcapping": {"final_logit_softcapping": 30.0},
    "logit_scale": {"logit_scale": 0.5},
    "residual_scale": {"residual_scale": 0.5},
    "expert_count": {"expert_count": 4},
    "rope.scaling.type": {"rope.scaling.type": "longrope"},
    "rope.scaling.attn_factor": {"rope.scaling.attn_factor": 1.2},
    "rope.freq_base_swa": {"rope.freq_base_swa": 500.0},
    "rope.dimension_count": {"attention.key_length": 32, "rope.dimension_count": 16},
    "other.key": {".other.key": 1},
    "split.count": {".split.count": 3},
    "general.type is `adapter`": {".general.type": "adapter"},
}


@pytest.mark.parametrize("key", REJECTED)
def test_an_unsupported_key_is_an_error_that_names_it(key, write):
    _, file = write(REJECTED[key])
    with pytest.raises(SourceError, match=key.replace(".", r"\.")):
        opened(file)


def test_keys_without_effect_are_accepted(write):
    _, file = write(
        {".general.name": "tiny", ".quantize.imatrix.file": "x", ".general.sampling.temp": 0.5, "expert_count": 0}
        | {"attention.sliding_window": 2048, "rope.scaling.type": "none", "rope.scaling.finetuned": False}
    )
    assert opened(file)


def test_rotary_divisors_of_an_unknown_formula_are_rejected(write):
    _, file = write(extra={"rope_freqs.weight": np.linspace(1.0, 3.0, 16) ** 2})
    with pytest.raises(SourceError, match=r"rope_freqs\.weight scales the rotary frequencies by an unknown formula"):
        opened(file)


def test_rotary_divisors_of_one_change_nothing(write):
    _, file = write(extra={"rope_freqs.weight": np.ones(16)})
    assert opened(file).config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("tensor", ["blk.1.attn_output_norm.weight", "blk.0.ffn_gate_shexp.weight"])
def test_a_tensor_without_a_place_is_an_error_that_names_it(tensor, write):
    _, file = write(extra={tensor: np.ones(64)})
    with pytest.raises(SourceError, match=tensor):
        opened(file)


def test_biases_without_a_place_are_an_error_that_names_them(write):
    _, file = write(extra={"blk.0.attn_q.bias": np.ones(64), "blk.1.attn_q.bias": np.ones(64)})
    with pytest.raises(SourceError, match=r"does not hold.*self_attn\.\w_proj\.bias"):
        opened(file)


def test_a_missing_weight_is_an_error_that_names_it(write):
    _, file = write(extra={"blk.1.ffn_up.weight": None})
    with pytest.raises(SourceError, match=r"does not hold.*layers\.1\.mlp\.up_proj\.weight"):
        opened(file)


def test_an_unsupported_architecture_gets_a_fitting_remedy(write):
    _, file = write(architecture="smollm3")
    with pytest.raises(SourceError, match=r"smollm3 is not supported.*use the safetensors release"):
        load(context(file.parent, gguf_file=file.name), LOAD)


GEMMA_2 = Gemma2Config(**SHAPE | {"num_key_value_heads": 2}, head_dim=64, query_pre_attn_scalar=64, sliding_window=64)
FAMILIES = {
    "llama": ({}, None),
    "qwen2": (
        SCALED | {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 512, "rope.freq_base": 1e6},
        Qwen2Config(**SHAPE),
    ),
    "gemma2": (
        {"attention.key_length": 64, "attention.value_length": 64, "attention.sliding_window": 64}
        | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
        GEMMA_2,
    ),
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_loaded_source_agrees_with_llama_cpp(architecture, write, monkeypatch):
    settings, config = FAMILIES[architecture]
    _, file = write(settings, architecture=architecture, config=config)
    # The file's vocabulary is byte-level for every architecture, unlike Gemma's.
    monkeypatch.setattr(load_module, "checked_tokenizer", lambda tokenizer, *_: tokenizer)
    monkeypatch.setattr(load_module, "require_same_encodings", lambda *_: None)
    record = load(context(file.parent, gguf_file=file.name), LOAD).checks["agreement_with_llama_cpp"]
    assert record.positions == 64
    assert record.same_argmax.value >= 0.97
    assert record.mean_absolute_difference_nats < 1e-2


def test_a_model_that_differs_from_llama_cpp_s_is_rejected(write):
    _, file = write()
    header = read_header(file)
    result = load(context(file.parent, gguf_file=file.name), LOAD)
    ids = probe_ids(result.tokenizer, 2048)
    predictions = llama_cpp_outcome(file, ids).predictions
    assert require_same_model(header, result.model, ids, predictions)
    result.model.model.rotary_emb.inv_freq /= 4.0
    with pytest.raises(
        SourceError, match=r"differs from the model that llama\.cpp runs: same next token at 0\.\d+ of 64"
    ):
        require_same_model(header, result.model, ids, predictions)


def test_a_file_that_llama_cpp_cannot_run_is_rejected(write):
    _, file = write(extra={"blk.0.attn_q.weight": np.ones((64, 64))[:, :32]})
    with pytest.raises(SourceError, match=r"llama\.cpp does not run this file, so .* cannot be checked"):
        llama_cpp_outcome(file, range(20))
