"""Texts that run as a tree give the hidden states and gradients of texts that run one by one."""

import copy
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lilliput.compress.lora import with_adapter
from lilliput.config import LoraConfig
from lilliput.statistics.perplexity import IGNORED
from lilliput.training.answer_loss import answer_logits, label_loss, runs_as_tree
from lilliput.training.examples import Example, collate
from lilliput.training.token_tree import token_tree

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def model_of(family, **settings):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SHAPE | settings)
    return AutoModelForCausalLM.from_config(config).float().train()


def one_by_one(model, batch):
    """Returns the loss of plain transformers: whole texts, padded."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)


def draw(rng, low, high):
    return [rng.randrange(1, 64) for _ in range(rng.randint(low, high))]


def batch_of(rows=9, seed=0):
    """Texts with a common prefix, few questions and different answers; two texts are equal."""
    rng = random.Random(seed)
    prefix, questions = draw(rng, 7, 7), [draw(rng, 2, 12) for _ in range(4)]
    texts = [(prefix + rng.choice(questions), draw(rng, 1, 5)) for _ in range(rows)]
    texts[-1] = texts[0]
    return collate([Example(q + a, [IGNORED] * len(q) + a) for q, a in texts], 0)


def gradients(model, loss):
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def assert_same(model, batch):
    other = copy.deepcopy(model)
    loss, expected = label_loss(model, batch), one_by_one(other, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    actual, reference = gradients(model, loss), gradients(other, expected)
    for name, gradient in reference.items():
        assert torch.allclose(actual[name], gradient, rtol=1e-4, atol=1e-5), name


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 40},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 40},  # eager attention, because of its softcap
    "gemma3_text": {"sliding_window": 40},
    "phi3": {},
    "olmo2": {},
    "granite": {},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_whole_texts(family):
    model, batch = model_of(family, **FAMILIES[family]), batch_of()
    assert runs_as_tree(model, batch["input_ids"].shape[1])
    assert_same(model, batch)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 6}),
        ("gemma3_text", {"sliding_window": 6}),
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
        ("gemma2", {"sliding_window": 6}),
    ],
)
def test_models_with_windows_or_convolutions_run_padded_texts(family, settings):
    model, batch = model_of(family, **settings), batch_of()
    assert not runs_as_tree(model, batch["input_ids"].shape[1])
    assert_same(model, batch)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_any_number_of_texts_equals_whole_texts(rows, sharded, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(sharded).lower())  # runs without the cache
    assert_same(model_of("llama"), batch_of(rows))


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_gradients_of_adapters_equal_those_of_whole_texts(variant):
    config = LoraConfig.model_construct(
        variant=variant, rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", seed=1
    )
    tuned = with_adapter(model_of("llama"), config).train()
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    assert_same(tuned, batch_of())


def test_equal_prompts_with_other_answers_keep_their_targets():
    prompt = [5, 6, 7]
    batch = collate([Example(prompt + a, [IGNORED] * 3 + a) for a in ([8, 9], [10], [8, 11, 12])], 0)
    logits, targets = answer_logits(model_of("llama"), batch)
    assert targets.tolist() == [8, 9, 10, 8, 11, 12]
    assert torch.equal(logits[0], logits[2])  # one hidden state, before three answers


texts = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=90), min_size=1, max_size=12)


@given(texts, st.integers(0, 5))
def test_a_token_attends_to_its_own_text_up_to_itself(texts, shared):
    whole = [[7] * shared + text for text in texts]
    tree = token_tree(whole, shared)
    flat, (bins, width) = tree.ids.flatten(), tree.ids.shape
    columns = torch.cat([torch.full((bins, shared), 7), tree.ids], dim=1)
    for text, places in zip(texts, tree.places, strict=True):
        assert flat[places].tolist() == text
        assert tree.positions.flatten()[places].tolist() == list(range(shared, shared + len(text)))
        for end, place in enumerate(places, 1):
            seen = tree.mask[place // width, 0, place % width]
            assert sorted(columns[place // width][seen].tolist()) == sorted([7] * shared + text[:end])
    assert tree.mask.any(-1).all()  # no row without a column, whose softmax would be NaN
    assert bins * width <= len(texts) * max(map(len, texts))  # never more tokens than padded texts
