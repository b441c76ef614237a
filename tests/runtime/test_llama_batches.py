"""llama.cpp through llama.h: many prompts together have the results of its server, which takes them one by one."""

import numpy as np
import pytest
from scipy.special import log_softmax

from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget
from lilliput.errors import ArtifactError
from lilliput.runtime import llama_library
from lilliput.runtime.llama_library import BATCH_TOKENS, LlamaModel, Token
from lilliput.runtime.llamacpp import LlamaCppRuntime
from lilliput.runtime.protocol import ScoresByPrediction

SYSTEM = list(range(300, 330))
PROMPTS = [[*SYSTEM, *range(40 + n, 40 + n + 3 + n % 4)] for n in range(40)]
LONG = [*SYSTEM, *(37 * n % 900 + 100 for n in range(3 * BATCH_TOKENS))]
OPTIONS = [[5], [6, 7], [6, 8, 9], [5, 10, 11, 12]]


@pytest.fixture(scope="module")
def file(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    compile_gguf(checkpoint, folder, GgufTarget(candidate="a", target="gguf", floats="f32", embeddings="f32"))
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def runtime(file):
    return LlamaCppRuntime(file, threads=1, context_tokens=512)


def test_scores_are_those_of_one_token_at_a_time(runtime):
    prompts = [*PROMPTS[:9], LONG]
    expected = np.array(ScoresByPrediction.score(runtime, prompts, [OPTIONS] * len(prompts)))
    actual = np.array(runtime.score(prompts, [OPTIONS] * len(prompts)))
    np.testing.assert_allclose(actual[:-1], expected[:-1], atol=2e-3)
    np.testing.assert_allclose(actual[-1], expected[-1], atol=0.05)  # the server takes a long prompt in one batch
    assert np.ptp(expected) > 0.1


def test_a_score_does_not_depend_on_the_other_prompts(runtime):
    together = runtime.score([*PROMPTS, LONG], [OPTIONS] * (len(PROMPTS) + 1))
    alone = [runtime.score([prompt], [OPTIONS])[0] for prompt in (PROMPTS[0], PROMPTS[-1], LONG)]
    np.testing.assert_allclose([together[0], together[-2], together[-1]], alone, atol=1e-4)


def test_logits_are_those_of_the_scores(runtime):
    prompts, continuations = [*PROMPTS, LONG], [OPTIONS[row % 4] for row in range(len(PROMPTS) + 1)]
    scores, logits = runtime.score(prompts, [[ids] for ids in continuations]), {}
    runtime.logits(prompts, continuations, logits.__setitem__)
    assert sorted(logits) == list(range(len(prompts)))
    for row, ids in enumerate(continuations):
        assert logits[row].shape[0] == len(ids)
        likelihoods = log_softmax(logits[row], axis=-1)[np.arange(len(ids)), ids]
        assert likelihoods.sum() == pytest.approx(scores[row][0], abs=1e-4)


def test_answers_are_those_of_the_server(runtime):
    prompts = [*PROMPTS, LONG]
    expected = [runtime._complete(ids, n_predict=12)["choices"][0]["text"].strip() for ids in prompts]
    assert runtime.generate(prompts, 12) == expected
    assert len(set(expected)) > 5


def test_no_prompts_have_no_results(runtime):
    assert runtime.score([], []) == []
    assert runtime.generate([], 5) == []


def test_an_answer_ends_with_a_token_that_ends_answers(runtime, monkeypatch):
    first = runtime.generate(PROMPTS[:1], 1)
    endings = []
    monkeypatch.setattr(LlamaModel, "ends_answer", lambda model, token: endings.append(token) or len(endings) > 1)
    assert runtime.generate(PROMPTS[:1], 12) == first


def test_a_model_that_is_not_a_number_is_an_error(file, monkeypatch):
    monkeypatch.setattr(llama_library.np, "isfinite", lambda values: np.zeros_like(values, dtype=bool))
    model = LlamaModel(file)
    context = model.context(8, 1, 1)
    with pytest.raises(ArtifactError, match="a logit is NaN or infinite"):
        context.compute([Token(5, 0, [0], predicts=True)])
    context.close()
    model.close()


def test_a_file_that_is_no_model_is_an_error(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ArtifactError, match=r"model\.gguf: llama\.cpp does not open it"):
        LlamaModel(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_FIRST_DEFAULTS", (512, 2048, 512, 2)),
        ("_FLAGS", bytes([9] * 6)),
        ("_FUNCTIONS", {"llama_of_another_release": (None,)}),
    ],
)
def test_another_interface_is_refused_before_it_is_used(file, monkeypatch, name, value):
    llama_library._library.cache_clear()
    monkeypatch.setattr(llama_library, name, value)
    with pytest.raises(ArtifactError, match=r"another interface of llama\.h .* install the release that requirements"):
        LlamaModel(file)
    llama_library._library.cache_clear()
