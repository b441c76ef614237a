import pytest
import torch

from lilliput.chat.template import encode_answer, encode_prompt
from lilliput.errors import ArtifactError, DataError
from lilliput.runtime.torch import TorchRuntime

SYSTEM = "Answer briefly."


@pytest.fixture
def asked(opened, facts):
    """Prompts of different lengths with a common beginning, and the options of each."""
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
def test_scores_are_those_of_the_plain_forward_of_each_sequence(opened, asked, batch_size):
    prompts, options = asked
    found = TorchRuntime(*opened, batch_size).score(prompts, options)
    for prompt, choices, scores in zip(prompts, options, found, strict=True):
        assert scores == pytest.approx([plain_score(opened[0], prompt, choice) for choice in choices], abs=1e-4)


def test_a_single_prompt_and_options_of_one_token(opened):
    model, tokenizer = opened
    found = TorchRuntime(model, tokenizer, 4).score([[5, 6, 7]], [[[8], [9]]])
    assert found[0] == pytest.approx([plain_score(model, [5, 6, 7], [token]) for token in (8, 9)], abs=1e-4)


def test_prompts_without_a_common_beginning(opened):
    found = TorchRuntime(*opened, 4).score([[5, 6, 7], [9, 8]], [[[3, 4]], [[4]]])
    assert found[0][0] == pytest.approx(plain_score(opened[0], [5, 6, 7], [3, 4]), abs=1e-4)
    assert found[1][0] == pytest.approx(plain_score(opened[0], [9, 8], [4]), abs=1e-4)


def test_texts_beyond_the_attention_window_are_refused(opened, monkeypatch):
    monkeypatch.setattr(opened[0].config, "sliding_window", 4, raising=False)
    runtime = TorchRuntime(*opened, 4)
    assert runtime.score([[5, 6]], [[[3, 4]]])
    with pytest.raises(DataError, match=r"5 tokens.* only 4"):
        runtime.score([[5, 6, 7]], [[[3, 4]]])


@pytest.mark.parametrize("batch_size", [1, 16])
def test_answers_are_those_of_transformers_greedy_generation(opened, asked, batch_size):
    model, tokenizer = opened
    prompts, _ = asked
    found = TorchRuntime(model, tokenizer, batch_size).generate(prompts, 6)
    for prompt, text in zip(prompts, found, strict=True):
        ids = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=6, do_sample=False
        )
        assert text == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip()


def test_an_answer_ends_at_the_end_token_while_others_go_on(opened, asked):
    model, tokenizer = opened
    prompts, _ = asked
    runtime = TorchRuntime(model, tokenizer, 16)
    free = [list(runtime.stream(prompt, 6)) for prompt in prompts]
    ender = free[0][2]  # declare a token that some answers hold to be the end
    model.generation_config.eos_token_id = ender
    assert any(ender not in tokens for tokens in free)
    expected = [tokens[: tokens.index(ender)] if ender in tokens else tokens for tokens in free]
    assert runtime.generate(prompts, 6) == [tokenizer.decode(t, skip_special_tokens=True).strip() for t in expected]


def test_stream_gives_the_tokens_one_by_one_up_to_the_limit(opened, asked):
    model, _ = opened
    prompt = asked[0][0]
    ids = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=5, do_sample=False
    )
    assert list(TorchRuntime(*opened, 1).stream(prompt, 5)) == ids[0, len(prompt) :].tolist()


def test_a_model_that_gives_no_numbers_is_an_error_not_a_score(opened):
    opened[0].model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ArtifactError, match="not all numbers"):
        TorchRuntime(*opened, 2).score([[5, 6]], [[[7], [8]]])
    with pytest.raises(ArtifactError, match="not all numbers"):
        next(TorchRuntime(*opened, 2).stream([5, 6], 4))


@pytest.mark.parametrize(
    "prompt", [[12], [5], [5, 9], [5, 6, 9, 10], [5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10]]
)
def test_a_kept_prefix_changes_no_token_however_much_of_it_a_prompt_shares(opened, prompt):
    keeping = TorchRuntime(*opened, 1, prefix=[5, 6, 7, 8])
    expected = list(TorchRuntime(*opened, 1).stream(prompt, 5))
    assert list(keeping.stream(prompt, 5)) == expected
    assert list(keeping.stream(prompt, 5)) == expected  # what is kept is not what the answer was added to


def test_a_kept_prefix_is_not_run_again(opened, asked):
    prompt = asked[0][0]
    lengths = []
    opened[0].register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    keeping = TorchRuntime(*opened, 1, prefix=prompt[:-3])
    for _ in range(2):
        next(keeping.stream(prompt, 1))
    assert lengths == [len(prompt) - 3, 3, 3]
