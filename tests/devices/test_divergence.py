"""The divergence of a compiled model, from real files through its own runtime."""

import numpy as np
import pytest

from lilliput.chat.template import encode_answer
from lilliput.compile.gguf import compile_gguf
from lilliput.compile.onnx import compile_onnx
from lilliput.config import GgufTarget, OnnxTarget
from lilliput.devices.answers import CompiledRuntime
from lilliput.devices.divergence import measure_divergence
from lilliput.errors import ArtifactError
from lilliput.models import open_frozen
from lilliput.runtime.torch import TorchRuntime
from tests.compile.conftest import quantised  # noqa: F401


class Same:
    """Writes the logits of a checkpoint, as a runtime that rounds nothing would."""

    def __init__(self, checkpoint, batch_size, width=None):
        self.checkpoint, self.batch_size, self.width, self.answers = checkpoint, batch_size, width, []

    def write_logits(self, prompts, answers, file):
        rows = {}
        TorchRuntime(*open_frozen(self.checkpoint), self.batch_size).logits(prompts, answers, rows.__setitem__)
        np.save(file, np.concatenate([rows[row] for row in range(len(rows))])[:, : self.width])
        self.answers = answers


@pytest.fixture
def measure(checkpoint, tokenizer, facts, tiny_params):
    def run(runtime, references=None, questions=facts, tokens=48):
        parity = tiny_params.parity.model_copy(update={"divergence_tokens": tokens})
        params = tiny_params.model_copy(update={"parity": parity})
        return measure_divergence(runtime, references or {"lora": checkpoint}, tokenizer, questions, params)

    return run


@pytest.fixture
def same(checkpoint, tiny_params):
    return lambda **options: Same(checkpoint, tiny_params.evaluation.batch_size, **options)


def test_a_smaller_type_diverges_more(checkpoint, measure, tmp_path):
    means, agreements = [], []
    for kind in ("f32", "q8_0", "q4_0"):
        folder = tmp_path / kind
        folder.mkdir()
        compile_gguf(checkpoint, folder, GgufTarget(candidate="a", target="gguf", floats=kind, embeddings=kind))
        record = measure(CompiledRuntime("gguf", folder, 1))["lora"]
        assert record.tokens == 48
        means.append(record.kl_mean_nats.value)
        agreements.append(record.same_top.value)
    assert 0.0 < means[0] < 1e-3 < means[1] < means[2]
    assert agreements[0] == 1.0 > agreements[2]


def test_the_same_model_does_not_diverge(measure, same):
    record = measure(same())["lora"]
    assert record.kl_mean_nats.value == 0.0
    assert record.same_top.value == 1.0
    assert record.rms_delta_p.value == 0.0


def test_each_reference_has_figures_of_its_own(checkpoint, measure, same, quantised):  # noqa: F811
    found = measure(same(), {"pocket": quantised(), "lora": checkpoint})
    assert list(found) == ["pocket", "lora"]
    assert found["pocket"].kl_mean_nats.value > found["lora"].kl_mean_nats.value == 0.0
    assert found["pocket"].reference == "pocket"


def test_the_text_is_answers_with_their_end_up_to_the_number_of_tokens(measure, same, tokenizer, facts):
    whole = {tuple(encode_answer(tokenizer, row.answer)) for row in facts if row.answerable}
    runtime = same()
    assert measure(runtime, tokens=20)["lora"].tokens == 20
    *complete, last = map(tuple, runtime.answers)
    assert set(complete) <= whole
    assert any(last == answer[: len(last)] for answer in whole)
    measure(runtime, tokens=10_000)
    assert {tuple(answer) for answer in runtime.answers} == whole
    assert len(runtime.answers) == sum(row.answerable for row in facts)


def test_questions_without_answers_have_no_figures(measure, same, facts):
    assert measure(same(), questions=[row for row in facts if not row.answerable]) == {}


def test_another_vocabulary_is_an_error(measure, same):
    with pytest.raises(ArtifactError, match="they do not have the same vocabulary, so compile this candidate again"):
        measure(same(width=100))


@pytest.mark.slow
def test_onnx_runtime_gives_the_logits_of_a_text(measure, quantised, tmp_path):  # noqa: F811
    compile_onnx(quantised(), tmp_path, OnnxTarget(candidate="a", target="onnx"))
    record = measure(CompiledRuntime("onnx", tmp_path, 1), {"pocket": quantised()})["pocket"]
    assert 0.0 < record.kl_mean_nats.value < 0.5
    assert record.same_top.value > 0.5
