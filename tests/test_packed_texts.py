import math

import pytest
import torch
from transformers import GPT2Config, Lfm2Config, LlamaConfig, MambaConfig, MistralConfig, Qwen2Config

from lilliput.decoders import attention_reach
from lilliput.models import random_model
from lilliput.packed_texts import pack_texts

TEXTS = [[1, 2, 3, 10, 11], [1, 2, 3, 12], [1, 2, 3, 10, 13, 14, 15, 16], [1, 2, 3, 17, 18, 19]]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
SHAPE |= {"num_key_value_heads": 2, "initializer_range": 0.3}


def places(batches, texts, shared):
    """Yields (batch, row, place, text, position) of each token that counts."""
    for number, batch in enumerate(batches):
        for row, place in (batch.counts > 0).nonzero().tolist():
            owner = int(batch.texts[row, place]) - 1
            yield number, row, place, owner, int(batch.positions[row, place])


@pytest.mark.parametrize(("row_tokens", "batch_tokens"), [(256, 8192), (6, 8192), (6, 1), (1, 16)])
@pytest.mark.parametrize("config", [LlamaConfig(**SHAPE), MistralConfig(**SHAPE, sliding_window=4)])
def test_each_token_computes_what_its_own_text_computes(config, row_tokens, batch_tokens):
    model = random_model(config, seed=3).eval()
    batches = pack_texts(TEXTS, config, row_tokens=row_tokens, batch_tokens=batch_tokens)
    with torch.inference_mode():
        packed = [model(**batch.inputs(torch.device("cpu"))).logits for batch in batches]
        alone = [model(torch.tensor([text])).logits[0] for text in TEXTS]
    counted = 0.0
    for batch, row, place, owner, position in places(batches, TEXTS, 3):
        torch.testing.assert_close(packed[batch][row, place], alone[owner][position], rtol=1e-4, atol=1e-4)
        counted += batches[batch].counts[row, place].item()
    assert counted == sum(map(len, TEXTS))


def test_the_common_beginning_is_run_once_per_row_and_counted_once():
    (batch,) = pack_texts(TEXTS, LlamaConfig(**SHAPE), row_tokens=6, batch_tokens=1000)
    assert batch.ids[:, :3].tolist() == [[1, 2, 3]] * len(batch.ids)
    assert batch.counts[:, 0].tolist() == [4.0] + [0.0] * (len(batch.ids) - 1)


def test_a_text_that_is_the_beginning_of_the_others_keeps_a_token_of_its_own():
    (batch,) = pack_texts([[1, 2], [1, 2, 3]], LlamaConfig(**SHAPE), batch_tokens=1000)
    assert sorted(batch.texts[0].tolist()) == [0, 1, 2, 2]


@pytest.mark.parametrize("kinds", [["full_attention", "linear_attention"], ["conv", "full_attention"]])
def test_recurrent_models_get_one_text_a_row(kinds):
    config = LlamaConfig(**SHAPE)
    config.layer_types = kinds
    (batch,) = pack_texts(TEXTS, config, batch_tokens=1000)
    assert [len(set(row[row >= 0].tolist())) for row in batch.texts] == [1] * len(TEXTS)
    assert batch.inputs(torch.device("cpu"))["attention_mask"].sum() == sum(map(len, TEXTS))


@pytest.mark.parametrize(
    ("config", "reach"),
    [
        (LlamaConfig(**SHAPE), math.inf),
        (MistralConfig(**SHAPE, sliding_window=4), 4),
        (Qwen2Config(**SHAPE, sliding_window=4, use_sliding_window=False), math.inf),
        (MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=40), 0),
        (Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]), 0),
        (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40), math.inf),
    ],
    ids=lambda value: type(value).__name__,
)
def test_reach_is_that_of_the_layer_that_sees_least(config, reach):
    assert attention_reach(config) == reach


def test_batches_keep_to_their_tokens():
    batches = pack_texts([list(range(1, 9)) for _ in range(9)], LlamaConfig(**SHAPE), row_tokens=1, batch_tokens=20)
    assert all(batch.ids.numel() <= 20 for batch in batches)
