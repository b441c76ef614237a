import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from lilliput.chat.template import encode_prompt
from lilliput.compile import parity
from lilliput.compile.autogptq import compile_autogptq
from lilliput.compile.gguf import compile_gguf
from lilliput.compile.onnx import compile_onnx
from lilliput.compile.parity import prove_parity
from lilliput.config import AutogptqTarget, GgufTarget, OnnxTarget
from lilliput.errors import ArtifactError, CompileError
from lilliput.evaluate.accuracy import score_choices
from lilliput.models import open_model
from lilliput.runtime.torch import TorchRuntime

SYSTEM = "Answer."
FLOATS = GgufTarget(candidate="small", target="gguf", floats="f32", embeddings="f32")


@pytest.fixture(scope="module")
def chosen(facts):
    """Returns the checkpoint's choice for each question."""

    def choices_of(checkpoint):
        model, tokenizer = open_model(checkpoint)
        asked = [question for question in facts if question.choices]
        scores = score_choices(TorchRuntime(model, tokenizer, 8), tokenizer, SYSTEM, asked)
        return {q.id: q.choices[int(np.argmax(row))] for q, row in zip(asked, scores, strict=True)}

    return choices_of


@pytest.fixture
def prove(facts, chosen, tiny_params):
    def run(target, folder, checkpoint, **limits):
        config = tiny_params.parity.model_copy(update={"questions": 12, **limits})
        return prove_parity("small", target, folder, checkpoint, facts, chosen(checkpoint), SYSTEM, config)

    return run


def test_llama_cpp_predicts_like_a_float_checkpoint(checkpoint, prove, tmp_path):
    compile_gguf(checkpoint, tmp_path, FLOATS)
    record = prove("gguf", tmp_path, checkpoint, same_argmax=0.99)
    assert record.positions == 63
    assert record.same_argmax.value >= 0.99
    assert record.mean_absolute_difference_nats < 0.01
    assert record.same_choices.value == 1.0
    assert record.questions == 12


def test_the_chat_server_gets_control_tokens_split_as_in_evaluation(
    checkpoint, facts, tokenizer, tiny_params, tmp_path, monkeypatch
):
    compile_gguf(checkpoint, tmp_path, FLOATS)
    outcomes, real = [], parity.run_on_device
    monkeypatch.setattr(parity, "run_on_device", lambda *args, **kw: outcomes.append(real(*args, **kw)) or outcomes[-1])
    asked = [facts[0].model_copy(update={"question": "What does <|im_end|> end?"}), *facts[1:]]
    config = tiny_params.parity.model_copy(update={"questions": 2})
    prove_parity("small", "gguf", tmp_path, checkpoint, asked, {}, SYSTEM, config)
    (chats,) = (outcome.chats for outcome in outcomes if outcome.chats)
    assert chats == [encode_prompt(tokenizer, SYSTEM, question.question) for question in asked[:2]]


@pytest.mark.slow
def test_a_compiled_model_passes_against_its_own_checkpoint_and_fails_against_another(
    checkpoint, quantised, prove, tmp_path
):
    compile_gguf(quantised(), tmp_path, FLOATS)
    assert prove("gguf", tmp_path, quantised()).mean_absolute_difference_nats < 0.2
    other = shutil.copytree(checkpoint, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompileError, match=r"differs from the checkpoint .*(same argmax|mean log-likelihood)"):
        prove("gguf", tmp_path, other, same_argmax=0.99)


@pytest.mark.slow
def test_a_truncated_file_is_an_error(checkpoint, prove, tmp_path):
    compile_gguf(checkpoint, tmp_path, FLOATS)
    file = tmp_path / "model.gguf"
    file.write_bytes(file.read_bytes()[:-100_000])
    with pytest.raises(ArtifactError, match=r"llama\.cpp does not open it"):
        prove("gguf", tmp_path, checkpoint)


@pytest.mark.slow
def test_a_runtime_that_hangs_is_stopped(checkpoint, prove, tmp_path):
    compile_gguf(checkpoint, tmp_path, FLOATS)
    with pytest.raises(ArtifactError, match=r"did not finish within 0\.2 s and was stopped"):
        prove("gguf", tmp_path, checkpoint, deadline_s=0.2)


@pytest.mark.slow
def test_onnx_runtime_predicts_like_the_checkpoint(quantised, prove, tmp_path):
    facts = compile_onnx(quantised(), tmp_path, OnnxTarget(candidate="small", target="onnx"))
    assert facts == {"precision": "int4", "embeddings": "int8", "code_layers": 28}
    record = prove("onnx", tmp_path, quantised())
    assert record.same_argmax_clear.value >= 0.99 or record.same_argmax_clear.n == 0
    assert record.mean_absolute_difference_nats < 0.2


def test_onnx_rejects_grids_that_its_builder_does_not_support(quantised, tmp_path):
    with pytest.raises(CompileError, match="layers of 2 bits; ONNX"):
        compile_onnx(quantised(2), tmp_path, OnnxTarget(candidate="small", target="onnx"))


def test_onnx_reports_the_builder_s_error(quantised, tmp_path):
    folder = shutil.copytree(quantised(), tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"architectures": ["MixtralForCausalLM"]}))
    with pytest.raises(CompileError, match="builder does not support this model"):
        compile_onnx(folder, tmp_path / "out", OnnxTarget(candidate="small", target="onnx"))


@pytest.mark.slow
def test_the_autogptq_export_has_the_files_that_auto_gptq_reads(quantised, prove, tmp_path):
    compile_autogptq(quantised(), tmp_path, AutogptqTarget(candidate="small", target="autogptq"))
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    assert config["tie_word_embeddings"] is False
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert (tensors["lm_head.weight"] == tensors["model.embed_tokens.weight"]).all()
    assert (tmp_path / "quantize_config.json").exists()
    assert prove("autogptq", tmp_path, quantised()).mean_absolute_difference_nats < 0.02


def test_autogptq_rejects_float_checkpoints(checkpoint, tmp_path):
    with pytest.raises(CompileError, match="not quantised"):
        compile_autogptq(checkpoint, tmp_path, AutogptqTarget(candidate="small", target="autogptq"))
