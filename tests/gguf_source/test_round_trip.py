"""A compiled GGUF file is read back as the same model."""

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig, StableLmConfig

from lilliput.gguf_source.header import read_header
from lilliput.gguf_source.opening import gguf_config, open_gguf

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}


def llama(**settings):
    return LlamaConfig(architectures=["LlamaForCausalLM"], **SHAPE, **settings)


def rope(kind, **settings):
    return {"rope_type": kind, "rope_theta": 10_000.0, **settings}


def llama3(**settings):
    published = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return rope("llama3", **published | {"original_max_position_embeddings": 8192} | settings)


GEMMA_ROPE = {"full_attention": rope("linear", factor=8.0), "sliding_attention": rope("default", rope_theta=500.0)}
CONFIGS = {
    "llama 3": llama(rope_parameters=llama3()),
    "llama 3, short context": llama(rope_parameters=llama3(factor=32.0, original_max_position_embeddings=256)),
    "llama 3, other bounds": llama(
        rope_parameters=llama3(low_freq_factor=2.0, high_freq_factor=24.0, original_max_position_embeddings=3000)
    ),
    "linear": llama(rope_parameters=rope("linear", factor=4.0)),
    "yarn": llama(rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=512)),
    "yarn, other ramp": llama(
        rope_parameters=rope("yarn", factor=8.0, original_max_position_embeddings=512, beta_fast=16.0, beta_slow=2.0)
    ),
    "biases": llama(attention_bias=True, mlp_bias=True),
    "larger heads": llama(head_dim=48),
    "qwen 3, larger heads": Qwen3Config(architectures=["Qwen3ForCausalLM"], head_dim=48, **SHAPE),
    "qwen 3, mixture": Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        norm_topk_prob=True,
        **SHAPE,
    ),
    "gemma 3, windows": Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=32,
        rope_parameters=GEMMA_ROPE,
        **SHAPE | {"num_hidden_layers": 6},
    ),
    "partly rotated": StableLmConfig(architectures=["StableLmForCausalLM"], partial_rotary_factor=0.5, **SHAPE),
}


@pytest.mark.parametrize(
    "name", [name if name in {"llama 3", "biases"} else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_a_compiled_model_gives_the_same_logits_when_read_back(name, compiled):
    model, file = compiled(CONFIGS[name])
    header = read_header(file)
    assert name != "llama 3" or gguf_config(header).rope_parameters == llama3()
    reopened = open_gguf(header, gguf_config(header)).eval()
    ids = torch.randint(5, 49_000, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, actual = model(ids).logits, reopened(ids).logits
    assert expected.abs().max() > 2  # otherwise equality would prove little
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=2e-3)
