import pytest
import torch

from lilliput.chat.template import encode_answer, encode_prompt
from lilliput.memory import Shape, answering_bytes, scoring_bytes
from lilliput.runtime import torch as runtime_module
from lilliput.runtime.torch import TorchRuntime

HALVED = [7, 3, 1, 2, 4, 2, 2]


@pytest.fixture
def scoring_task(opened, facts):
    tokenizer = opened[1]
    prompts = [encode_prompt(tokenizer, "Answer.", question.question) for question in facts[:7]]
    choices = [[encode_answer(tokenizer, choice, end=False) for choice in question.choices] for question in facts[:7]]
    return prompts, choices


def record_batches(monkeypatch, runtime, refuses=lambda rows: False):
    """Records the number of prompts per batch; batches for which `refuses` is true run out of memory, as on a GPU."""
    sizes = []

    def counted(real, count):
        def run(batch, *others):
            sizes.append(count(batch))
            if refuses(sizes[-1]):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(batch, *others)

        return run

    monkeypatch.setattr(runtime, "_prefill_batch", counted(runtime._prefill_batch, len))
    monkeypatch.setattr(runtime, "_pack_logits", counted(runtime._pack_logits, prompts_of))
    return sizes


def prompts_of(pack):
    return pack.continuations // 4


def test_a_batch_that_runs_out_of_memory_is_halved_and_answers_the_same(opened, scoring_task, monkeypatch):
    prompts, choices = scoring_task
    runtime = TorchRuntime(*opened, batch_size=16)
    scores, texts = runtime.score(prompts, choices), runtime.generate(prompts, 5)
    sizes = record_batches(monkeypatch, runtime, refuses=lambda rows: rows > 2)
    for halved, whole in zip(runtime.score(prompts, choices), scores, strict=True):
        assert halved == pytest.approx(whole, abs=1e-4)
    assert sizes == HALVED
    assert runtime.generate(prompts, 5) == texts
    assert sizes == HALVED * 2


def test_a_single_prompt_that_does_not_fit_is_an_error(opened, scoring_task, monkeypatch):
    runtime = TorchRuntime(*opened, batch_size=4)
    record_batches(monkeypatch, runtime, refuses=lambda rows: True)
    with pytest.raises(torch.OutOfMemoryError):
        runtime.generate(scoring_task[0], 5)


def test_batch_size_follows_free_memory(opened, scoring_task, monkeypatch):
    prompts, choices = scoring_task
    runtime = TorchRuntime(*opened, batch_size=16)
    sizes = record_batches(monkeypatch, runtime)
    scores, texts = runtime.score(prompts, choices), runtime.generate(prompts, 5)
    assert sizes == [7, 7]
    shape, longest = Shape.of(opened[0].config.to_dict()), max(map(len, prompts))
    for call, enough in (
        (runtime.score, scoring_bytes(shape, longest, 3 * longest, 40)),
        (runtime.generate, answering_bytes(shape, 3, longest + 5, longest)),
    ):
        sizes.clear()
        monkeypatch.setattr(runtime_module, "free_bytes", lambda device, enough=enough: enough)
        again = call(prompts, choices if call == runtime.score else 5)
        if call == runtime.score:
            assert all(one == pytest.approx(other, abs=1e-4) for one, other in zip(again, scores, strict=True))
        else:
            assert again == texts
        assert sum(sizes) == 7
        assert 1 <= max(sizes) < 7
