import pytest
import torch
from transformers import Glm4MoeConfig

from lilliput.models import random_model
from lilliput.runtime.torch import TorchRuntime


@pytest.fixture
def mixture(tokenizer):
    config = Glm4MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        initializer_range=0.2,
    )
    return random_model(config, seed=0).eval()


@torch.inference_mode()
def test_a_single_token_gives_the_result_of_transformers(mixture, tokenizer):
    ids = torch.tensor([[7]])
    mixture.set_experts_implementation("eager")
    expected = mixture(input_ids=ids).logits
    runtime = TorchRuntime(mixture, tokenizer, batch_size=2)
    assert torch.allclose(runtime.model(input_ids=ids).logits, expected, atol=1e-5)


def test_streamed_and_batched_answers_are_equal(mixture, tokenizer):
    runtime = TorchRuntime(mixture, tokenizer, batch_size=2)
    prompts = [[5, 6, 7, 8], [5, 6, 9]]
    streamed = [tokenizer.decode(list(runtime.stream(prompt, 6)), skip_special_tokens=True) for prompt in prompts]
    assert runtime.generate(prompts, 6) == [text.strip() for text in streamed]
