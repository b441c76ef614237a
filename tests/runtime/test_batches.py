import pytest
import torch

from lilliput.data.chat import encode_answer, encode_prompt
from lilliput.memory import Shape, scoring_bytes
from lilliput.runtime import torch as runtime_module
from lilliput.runtime.torch import TorchRuntime


@pytest.fixture
def asked(opened, facts):
    tokenizer = opened[1]
    prompts = [encode_prompt(tokenizer, "Answer.", question.question) for question in facts[:7]]
    choices = [[encode_answer(tokenizer, choice, end=False) for choice in question.choices] for question in facts[:7]]
    return prompts, choices


def watched(monkeypatch, runtime, refuses=lambda rows: False):
    """How many prompts each batch held; those that `refuses` run out of memory, as a GPU says it."""
    sizes, real = [], runtime._prefill_batch

    def prefill(rests, *others):
        sizes.append(len(rests))
        if refuses(len(rests)):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(rests, *others)

    monkeypatch.setattr(runtime, "_prefill_batch", prefill)
    return sizes


def test_a_batch_that_runs_out_of_memory_is_halved_and_answers_the_same(opened, asked, monkeypatch):
    prompts, choices = asked
    runtime = TorchRuntime(*opened, batch_size=16)
    scores, texts = runtime.score(prompts, choices), runtime.generate(prompts, 5)
    sizes = watched(monkeypatch, runtime, refuses=lambda rows: rows > 2)
    for halved, whole in zip(runtime.score(prompts, choices), scores, strict=True):
        assert halved == pytest.approx(whole, abs=1e-4)
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    assert runtime.generate(prompts, 5) == texts


def test_a_single_prompt_that_does_not_fit_is_an_error(opened, asked, monkeypatch):
    runtime = TorchRuntime(*opened, batch_size=4)
    watched(monkeypatch, runtime, refuses=lambda rows: True)
    with pytest.raises(torch.OutOfMemoryError):
        runtime.generate(asked[0], 5)


def test_batches_are_as_large_as_free_memory_lets_them_be(opened, asked, monkeypatch):
    prompts, choices = asked
    runtime = TorchRuntime(*opened, batch_size=16)
    sizes = watched(monkeypatch, runtime)
    scores = runtime.score(prompts, choices)
    assert sizes == [7]
    sizes.clear()
    shape, longest = (
        Shape.of(opened[0].config.to_dict()),
        max(map(len, prompts)) + max(len(c) for r in choices for c in r),
    )
    monkeypatch.setattr(runtime_module, "free_bytes", lambda device: scoring_bytes(shape, 3, longest, longest, 4))
    for fewer, whole in zip(runtime.score(prompts, choices), scores, strict=True):
        assert fewer == pytest.approx(whole, abs=1e-4)
    assert sum(sizes) == 7
    assert 1 < max(sizes) <= 4
