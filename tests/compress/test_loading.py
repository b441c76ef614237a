"""Sources that are supported, and sources that `load` rejects: wrong architecture, values that cannot be stored."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lilliput.compress.load import load
from lilliput.compress.rtn import rtn
from lilliput.config import LoadConfig, RtnConfig, SourceConfig
from lilliput.errors import ArtifactError, LilliputError, SourceError
from lilliput.models import open_model, translate_errors
from lilliput.saving import probe_logits, prove_reload, require_finite, save_model
from lilliput.source import fetch_source
from tests.contexts import context
from tests.gguf_source.conftest import perturbed, write_gguf

FLOAT32, FLOAT16 = LoadConfig(dtype="float32"), LoadConfig(dtype="float16")
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def source(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "source")


def change_tensors(folder, **changes):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, change in changes.items():
        change(tensors[name]) if callable(change) else tensors.update({name: change})
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(folder, drop=(), **changes):
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(config | changes))


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "bfloat16"), (float("inf"), "float32")])
def test_rejects_weights_that_are_not_finite_with_name_and_count(value, dtype, source):
    change_tensors(source, **{WEIGHT: lambda weight: weight[0, :3].fill_(value)})
    with pytest.raises(SourceError, match=rf"{WEIGHT}: 3 of 8192 values are NaN or infinite.*source is damaged"):
        load(context(source), LoadConfig(dtype=dtype))


def test_rejects_values_beyond_the_stored_dtype_with_the_largest(source):
    change_tensors(source, **{WEIGHT: lambda weight: weight[0, :2].fill_(-1e5)})
    with pytest.raises(SourceError, match=rf"{WEIGHT}: 2 of 8192 values \(largest 1e\+05\) do not fit into float16"):
        load(context(source), FLOAT16)
    assert load(context(source), LoadConfig(dtype="bfloat16"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e38, -3.4e38, 65519.0, -65520.0, 0.0])
def test_finds_exactly_the_tensors_that_are_not_finite(value, dtype):
    model = torch.nn.Linear(40, 30)
    model.register_buffer("empty", torch.empty(0))
    model.weight.data[17, 3] = value
    if torch.isfinite(model.weight.to(dtype)).all():
        require_finite(model, dtype, "here", "remedy")
    else:
        with pytest.raises(ArtifactError, match="here: weight: 1 of 1200 values"):
            require_finite(model, dtype, "here", "remedy")


@pytest.mark.filterwarnings("ignore:.*added tokens have no row in the embedding table:UserWarning")
def test_rejects_a_gguf_source_with_weights_that_are_not_finite(tmp_path):
    from transformers import LlamaConfig

    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = perturbed(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True))
    model.model.layers[0].mlp.up_proj.weight.data[3, :4] = float("nan")
    file = write_gguf(tmp_path / "model.gguf", model, "llama", {}, {})
    with pytest.raises(SourceError, match=r"layers\.0\.mlp\.up_proj\.weight: 4 of 4096 values are NaN"):
        load(context(tmp_path, gguf_file=file.name), FLOAT32)


def test_does_not_write_a_diverged_model(opened, tmp_path):
    model, tokenizer = opened
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = float("nan")
    with pytest.raises(ArtifactError, match=rf"not written: {WEIGHT}: 1 of 8192 values are NaN.*learning rate"):
        save_model(model, tokenizer, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_infinite_logits_of_finite_weights_have_their_own_message(opened, checkpoint):
    logits = probe_logits(*opened).clone()
    logits[0, 0] = float("nan")
    with pytest.raises(ArtifactError, match="logits are NaN or infinite although its weights are finite"):
        prove_reload(checkpoint, logits, 1e-3)


@pytest.mark.parametrize("method", ["bitsandbytes", "compressed-tensors", "fp8", "awq", "hqq", "torchao", "mxfp4"])
def test_message_on_an_unsupported_format_lists_the_supported_ones(method, source):
    change_config(source, quantization_config={"quant_method": method})
    with pytest.raises(SourceError, match=rf"`{method}`.*supported are safetensors in float32, .*`gptq`\), and GGUF"):
        load(context(source), FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_sources_are_supported(dtype, opened, tmp_path):
    model, tokenizer = opened
    save_model(model, tokenizer, tmp_path, dtype)
    loaded = load(context(tmp_path), FLOAT32).model
    assert torch.equal(probe_logits(loaded, tokenizer), probe_logits(model.float(), tokenizer))


@pytest.mark.slow
def test_dequantises_a_source_in_autogptqs_format(checkpoint, facts, tmp_path):
    packed, written = tmp_path / "packed", tmp_path / "written"
    packed.mkdir(), written.mkdir()
    result = rtn(context(checkpoint, held_out=facts[:2]), RtnConfig(bits=4, group_size=32, symmetric=True))
    result.save(packed)
    result.tokenizer.save_pretrained(packed)
    loaded = load(context(packed), FLOAT32)
    save_model(loaded.model, loaded.tokenizer, written)
    assert "quantization_config" not in json.loads((written / "config.json").read_text())
    assert torch.equal(probe_logits(*open_model(written)), probe_logits(*open_model(packed)))


def test_names_weights_without_a_place(source):
    change_tensors(source, **{"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    with pytest.raises(ArtifactError, match=r"1 weights have no place .*layers\.0\.self_attn\.q_proj\.bias"):
        load(context(source), FLOAT32)


def test_rejects_fewer_layers_than_the_files_hold(source):
    change_config(source, num_hidden_layers=2)
    with pytest.raises(ArtifactError, match=r"18 weights have no place .*layers\.2"):
        load(context(source), FLOAT32)


def test_untied_output_weights_correct_the_flag(source):
    change_tensors(source, **{"lm_head.weight": torch.randn(49152, 64)})
    loaded = load(context(source), FLOAT32)
    assert loaded.model.config.tie_word_embeddings is False
    assert loaded.model.get_output_embeddings().weight is not loaded.model.get_input_embeddings().weight


CONTRADICTIONS = {
    "architectures names MistralForCausalLM": {"architectures": ["MistralForCausalLM"]},
    "rope_theta is 500.0 in the old form .* 10000.0 in rope_parameters": {"rope_theta": 500.0},
    "rope_type is 'linear' in the old form": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "RoPE of type `mystery` is unknown": {"rope_parameters": {"rope_type": "mystery", "rope_theta": 10000.0}},
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_rejects_a_contradictory_configuration(message, source):
    change_config(source, **CONTRADICTIONS[message])
    with pytest.raises(SourceError, match=message):
        load(context(source), FLOAT32)


def test_old_and_new_form_of_rope_scaling_are_equivalent(source):
    new = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    change_config(source, rope_parameters=new)
    expected = load(context(source), FLOAT32)
    change_config(source, drop=["rope_parameters"], rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4.0})
    actual = load(context(source), FLOAT32)
    assert torch.equal(probe_logits(actual.model, actual.tokenizer), probe_logits(expected.model, expected.tokenizer))


def test_names_a_missing_shard(source):
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    here, missing = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    first = dict(list(tensors.items())[:5])
    save_file(first, source / here, metadata={"format": "pt"})
    index = {name: here if name in first else missing for name in tensors}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with pytest.raises(SourceError, match=f"{missing}.*damaged, missing or incomplete"):
        load(context(source), FLOAT32)


REMEDIES = {
    "install the package it names": ImportError("needs sentencepiece"),
    "more memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    "fetch both from the same revision": RuntimeError("You set `ignore_mismatched_sizes` to `False`"),
    "choose a supported model": ValueError("model type `x` but Transformers does not recognize this architecture"),
    "use the safetensors release": ValueError("GGUF model with architecture granite is not supported yet."),
    "download or create it again": OSError("incomplete metadata"),
}


@pytest.mark.parametrize("remedy", REMEDIES)
def test_the_remedy_fits_the_cause(remedy, tmp_path):
    with pytest.raises(LilliputError, match=remedy), translate_errors(tmp_path, SourceError):
        raise REMEDIES[remedy]


def test_a_built_in_chat_template_replaces_the_models_own(checkpoint, tmp_path):
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    fetch_source(SourceConfig(model=f"path:{checkpoint}", chat_template="chatml-tools"), fetched, tmp_path)
    result = load(context(fetched, chose_template=True), FLOAT32)
    assert "Functions:" in result.tokenizer.chat_template
    assert "added_tokens" not in result.facts  # the model has them


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"]},
            r"family `lfm2`, Lfm2ForCausalLM are not supp.*Qwen3",
        ),
        ({"model_type": "never_heard_of"}, r"family `never_heard_of`.*Choose one of a supported family: Cohere"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, r"quantised as `compressed-tensors`.*GGUF"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"quantised as `unknown` \(quantization\).*GGUF"),
    ],
)
def test_rejects_unknown_families_and_formats_before_the_weights_are_read(change, message, source):
    change_config(source, **change)
    (source / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(SourceError, match=message):
        load(context(source), FLOAT32)


def test_rejects_weights_in_a_format_that_config_json_does_not_mention(source):
    tensors = load_file(source / "model.safetensors")
    save_file(
        tensors | {WEIGHT: tensors[WEIGHT].to(torch.float8_e4m3fn)}, source / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(SourceError, match=rf"{WEIGHT} is stored as F8_E4M3, so the weights are quantised.*supported"):
        load(context(source), FLOAT32)


def test_rejects_a_missing_chat_template_before_the_tokenizer_is_opened(source):
    (source / "chat_template.jinja").unlink()
    (source / "tokenizer.json").write_text("not read")
    with pytest.raises(SourceError, match=r"there is no chat template.*set `source\.chat_template: chatml`"):
        load(context(source), FLOAT32)
