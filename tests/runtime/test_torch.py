import numpy as np
import pytest
import torch
from transformers import MistralConfig

from lilliput.chat.template import encode_answer, encode_prompt
from lilliput.errors import ArtifactError
from lilliput.models import random_model
from lilliput.runtime.torch import TorchRuntime

SYSTEM = "Answer briefly."


@pytest.fixture
def scoring_task(opened, facts):
    """Prompts of different lengths with a common prefix, and the options of each."""
    tokenizer = opened[1]
    questions = [
        question.model_copy(update={"question": question.question + " Now?" * (n % 4)})
        for n, question in enumerate(facts[:7])
    ]
    prompts = [encode_prompt(tokenizer, SYSTEM, question.question) for question in questions]
    return prompts, [
        [encode_answer(tokenizer, choice, end=False) for choice in question.choices] for question in questions
    ]


@torch.inference_mode()
def plain_score(model, prompt, continuation) -> float:
    logits = model(input_ids=torch.tensor([[*prompt, *continuation]])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + place, token].item() for place, token in enumerate(continuation))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_equal_those_of_a_plain_forward_pass_per_sequence(opened, scoring_task, batch_size):
    prompts, options = scoring_task
    actual = TorchRuntime(*opened, batch_size).score(prompts, options)
    for prompt, choices, scores in zip(prompts, options, actual, strict=True):
        assert scores == pytest.approx([plain_score(opened[0], prompt, choice) for choice in choices], abs=1e-4)


def test_a_single_prompt_and_options_of_one_token(opened):
    model, tokenizer = opened
    actual = TorchRuntime(model, tokenizer, 4).score([[5, 6, 7]], [[[8], [9]]])
    assert actual[0] == pytest.approx([plain_score(model, [5, 6, 7], [token]) for token in (8, 9)], abs=1e-4)


def test_prompts_without_a_common_prefix(opened):
    actual = TorchRuntime(*opened, 4).score([[5, 6, 7], [9, 8]], [[[3, 4]], [[4]]])
    assert actual[0][0] == pytest.approx(plain_score(opened[0], [5, 6, 7], [3, 4]), abs=1e-4)
    assert actual[1][0] == pytest.approx(plain_score(opened[0], [9, 8], [4]), abs=1e-4)


def require_plain_logits(model, runtime, prompts, continuations):
    actual = {}
    runtime.logits(prompts, continuations, actual.__setitem__)
    assert sorted(actual) == list(range(len(prompts)))
    for row, (prompt, ids) in enumerate(zip(prompts, continuations, strict=True)):
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        assert actual[row].dtype == np.float32
        np.testing.assert_allclose(actual[row], expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_logits_equal_those_of_a_plain_forward_pass_per_sequence(opened, scoring_task, batch_size):
    prompts, options = scoring_task
    require_plain_logits(opened[0], TorchRuntime(*opened, batch_size), prompts, [choices[1] for choices in options])


def test_logits_of_texts_longer_than_the_attention_window_are_computed_one_by_one(short_sighted):
    runtime = TorchRuntime(*short_sighted, 4)
    require_plain_logits(short_sighted[0], runtime, [[5, 6, 7, 8, 9, 10], [5, 6, 7]], [[3, 4], [4, 9, 12]])


@pytest.fixture
def short_sighted(opened):
    """A model whose layers see four tokens, and the tokenizer."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(**shape, num_hidden_layers=2, vocab_size=49152, sliding_window=4, initializer_range=0.3)
    return random_model(config, seed=0).eval(), opened[1]


def test_texts_longer_than_the_attention_window_are_scored_one_by_one(short_sighted):
    prompts, options = [[5, 6, 7, 8, 9, 10], [5, 6, 7]], [[[3, 4], [11]], [[4, 9, 12]]]
    actual = TorchRuntime(*short_sighted, 4).score(prompts, options)
    for prompt, choices, scores in zip(prompts, options, actual, strict=True):
        assert scores == pytest.approx([plain_score(short_sighted[0], prompt, ids) for ids in choices], abs=1e-4)


def test_answers_longer_than_the_attention_window_equal_plain_ones(short_sighted):
    model, tokenizer = short_sighted
    prompts = [[5, 6, 7, 8, 9, 10], [5, 6, 7]]
    texts = TorchRuntime(model, tokenizer, 4).generate(prompts, 5)
    streams = [list(TorchRuntime(model, tokenizer, 4, prefix=prompts[0]).stream(prompt, 5)) for prompt in prompts]
    for prompt, text, stream in zip(prompts, texts, streams, strict=True):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert stream == ids[len(prompt) :][: len(stream)]
        assert text == tokenizer.decode(stream, skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 16])
def test_answers_equal_greedy_generation_by_transformers(opened, scoring_task, batch_size):
    model, tokenizer = opened
    prompts, _ = scoring_task
    actual = TorchRuntime(model, tokenizer, batch_size).generate(prompts, 6)
    for prompt, text in zip(prompts, actual, strict=True):
        ids = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=6, do_sample=False
        )
        assert text == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip()


def test_an_answer_ends_at_the_end_token_while_others_continue(opened, scoring_task):
    model, tokenizer = opened
    prompts, _ = scoring_task
    runtime = TorchRuntime(model, tokenizer, 16)
    free = [list(runtime.stream(prompt, 6)) for prompt in prompts]
    end = free[0][2]  # a token that only some answers contain becomes the end token
    model.generation_config.eos_token_id = end
    assert any(end not in tokens for tokens in free)
    expected = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in free]
    assert runtime.generate(prompts, 6) == [tokenizer.decode(t, skip_special_tokens=True).strip() for t in expected]


def test_stream_yields_tokens_up_to_the_limit(opened, scoring_task):
    model, _ = opened
    prompt = scoring_task[0][0]
    ids = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=5, do_sample=False
    )
    assert list(TorchRuntime(*opened, 1).stream(prompt, 5)) == ids[0, len(prompt) :].tolist()


def test_a_model_with_nan_logits_is_an_error(opened):
    opened[0].model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        TorchRuntime(*opened, 2).score([[5, 6]], [[[7], [8]]])
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        next(TorchRuntime(*opened, 2).stream([5, 6], 4))


@pytest.mark.parametrize(
    "prompt", [[12], [5], [5, 9], [5, 6, 9, 10], [5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10]]
)
def test_a_stored_prefix_changes_no_token(opened, prompt):
    runtime = TorchRuntime(*opened, 1, prefix=[5, 6, 7, 8])
    expected = list(TorchRuntime(*opened, 1).stream(prompt, 5))
    assert list(runtime.stream(prompt, 5)) == expected
    assert list(runtime.stream(prompt, 5)) == expected  # the first answer did not change the stored cache


def test_a_stored_prefix_is_run_once(opened, scoring_task):
    prompt = scoring_task[0][0]
    lengths = []
    opened[0].register_forward_pre_hook(
        lambda _, __, arguments: lengths.append(arguments["input_ids"].shape[1]), with_kwargs=True
    )
    runtime = TorchRuntime(*opened, 1, prefix=prompt[:-3])
    for _ in range(2):
        next(runtime.stream(prompt, 1))
    assert lengths == [len(prompt) - 3, 3, 3]
