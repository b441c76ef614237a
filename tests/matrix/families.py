"""The families of the matrix: for each a tiny random model with its kinds of configuration, tokenizer and template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.families import CHATML
from tests.matrix import templates, vocabularies

if TYPE_CHECKING:  # the page needs the names of the families only, and these imports take seconds
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, NEURONS = 4, 4, 2, 16, 64, 128
WINDOW, CONTEXT = 512, 2048
_SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
}


def rope(kind: str = "default", base: float = 10_000.0, **scaling: Any) -> dict[str, Any]:
    """Returns the parameters of rotary embeddings."""
    return {"rope_type": kind, "rope_theta": base, **scaling}


@dataclass(frozen=True)
class Family:
    """A family of decoders.

    Attributes:
        name: as its publisher writes it.
        config: transformers' configuration class.
        settings: of the configuration, besides the common shape.
        special: the tokenizer's control tokens.
        tokens: the tokenizer's named tokens: bos, eos, unk, pad.
        template: the chat template.
        kind: of the vocabulary.
        tokenizer_class: as published.
        traits: what sets it apart, for the page.
        prefix: the tokenizer puts BOS before each text.
        pre: llama.cpp's name of the family's rule for splitting words, for vocabularies over bytes.
        ends: further tokens that end an answer, in generation_config.json.
        padding: rows of the embedding table without a token.
    """

    name: str
    config: str
    settings: Mapping[str, Any]
    special: tuple[str, ...]
    tokens: Mapping[str, str]
    template: str
    kind: vocabularies.Kind
    tokenizer_class: str
    traits: str
    prefix: bool = False
    pre: str = ""
    ends: tuple[str, ...] = ()
    padding: int = 0
    shape: Mapping[str, Any] = field(default_factory=lambda: _SHAPE)

    def __str__(self) -> str:
        return self.slug

    @property
    def slug(self) -> str:
        """A file name."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())


_LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SP_TOKENS = ("<s>", "</s>")
_SP_NAMED = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
_GEMMA_NAMED = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"}
_QWEN_NAMED = {"eos": "<|im_end|>", "pad": "<|endoftext|>"}
_LONGROPE = {
    "short_factor": [1.0 + 0.05 * place for place in range(HEAD_DIM // 2)],
    "long_factor": [2.0 + 0.5 * place for place in range(HEAD_DIM // 2)],
    "original_max_position_embeddings": 1024,
}

FAMILIES = (
    Family(
        "Llama 2",
        "LlamaConfig",
        {"num_key_value_heads": HEADS, "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
        _SP_TOKENS,
        _SP_NAMED,
        templates.LLAMA_2,
        "metaspace",
        "LlamaTokenizer",
        "SentencePiece, BOS, no pad token, a head for each key and value, separate output layer",
        prefix=True,
    ),
    Family(
        "Llama 3.1, 3.2",
        "LlamaConfig",
        {
            "tie_word_embeddings": True,
            "rope_parameters": rope(
                "llama3",
                500_000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=512,
            ),
        },
        _LLAMA_3_TOKENS,
        {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
        templates.LLAMA_3,
        "llama-bpe",
        "PreTrainedTokenizerFast",
        "Llama 3's RoPE scaling, BOS, dated prompt, two end tokens",
        prefix=True,
        pre="llama-bpe",
        ends=("<|end_of_text|>",),
    ),
    Family(
        "SmolLM2",
        "LlamaConfig",
        {"tie_word_embeddings": True, "rope_parameters": rope(base=100_000.0)},
        _CHATML_TOKENS,
        {"bos": "<|im_start|>", "eos": "<|im_end|>", "unk": "<|endoftext|>", "pad": "<|im_end|>"},
        CHATML,
        "smollm",
        "GPT2Tokenizer",
        "tied output layer, pad token is the end token",
        pre="smollm",
    ),
    Family(
        "SmolLM3",
        "SmolLM3Config",
        {"tie_word_embeddings": True, "no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False},
        _LLAMA_3_TOKENS + _CHATML_TOKENS[1:],
        {"bos": "<|begin_of_text|>", "eos": "<|im_end|>", "pad": "<|im_end|>"},
        CHATML,
        "llama-bpe",
        "PreTrainedTokenizerFast",
        "every fourth layer without positions (a list in the configuration)",
        pre="smaug-bpe",
    ),
    Family(
        "Qwen2.5",
        "Qwen2Config",
        {"tie_word_embeddings": True, "use_sliding_window": False, "rope_parameters": rope(base=1_000_000.0)},
        _CHATML_TOKENS,
        _QWEN_NAMED,
        templates.QWEN_2_5,
        "qwen2",
        "Qwen2Tokenizer",
        "biases of queries, keys and values; padded vocabulary; no BOS",
        pre="qwen2",
        ends=("<|endoftext|>",),
        padding=37,
    ),
    Family(
        "Qwen3",
        "Qwen3Config",
        {"tie_word_embeddings": True, "head_dim": 32, "rope_parameters": rope(base=1_000_000.0)},
        _CHATML_TOKENS,
        _QWEN_NAMED,
        CHATML,
        "qwen2",
        "Qwen2Tokenizer",
        "QK norm for each head, heads larger than hidden size / heads, padded vocabulary",
        pre="qwen2",
        ends=("<|endoftext|>",),
        padding=37,
    ),
    Family(
        "Gemma 2",
        "Gemma2Config",
        {
            "tie_word_embeddings": True,
            "head_dim": HEAD_DIM,
            "query_pre_attn_scalar": HEAD_DIM,
            "sliding_window": WINDOW,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        _GEMMA_TOKENS,
        _GEMMA_NAMED,
        templates.GEMMA,
        "gemma",
        "GemmaTokenizer",
        "soft caps, norms after each part, a window in every second layer, scaled embeddings, no system role",
        prefix=True,
        ends=("<end_of_turn>",),
    ),
    Family(
        "Gemma 3",
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 6,
            "tie_word_embeddings": True,
            "head_dim": HEAD_DIM,
            "query_pre_attn_scalar": HEAD_DIM,
            "sliding_window": WINDOW,
            "rope_parameters": {
                "full_attention": rope("linear", 1_000_000.0, factor=8.0),
                "sliding_attention": rope(),
            },
        },
        _GEMMA_TOKENS,
        _GEMMA_NAMED,
        templates.GEMMA,
        "gemma",
        "GemmaTokenizer",
        "QK norm, a window in five of six layers, two RoPEs, padded vocabulary",
        prefix=True,
        ends=("<end_of_turn>",),
        padding=4,
    ),
    Family(
        "Phi-3",
        "Phi3Config",
        {"tie_word_embeddings": False, "sliding_window": WINDOW, "num_key_value_heads": HEADS, "pad_token_id": None},
        (*_SP_TOKENS, "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        {"bos": "<s>", "eos": "<|endoftext|>", "unk": "<unk>", "pad": "<|endoftext|>"},
        templates.PHI_3,
        "metaspace",
        "LlamaTokenizer",
        "fused projections, a window in every layer",
        ends=("<|end|>",),
        padding=21,
    ),
    Family(
        "Phi-4-mini",
        "Phi3Config",
        {
            "tie_word_embeddings": True,
            "sliding_window": None,
            "pad_token_id": None,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 1024,
            "rope_parameters": rope(
                "longrope", **{k: v[:6] if isinstance(v, list) else v for k, v in _LONGROPE.items()}
            )
            | {"partial_rotary_factor": 0.75},
        },
        ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>", "pad": "<|endoftext|>"},
        templates.PHI_4,
        "llama-bpe",
        "GPT2Tokenizer",
        "fused projections, three quarters of each head rotated, LongRoPE, tied output layer",
        pre="gpt-4o",
        ends=("<|end|>",),
    ),
    Family(
        "Mistral",
        "MistralConfig",
        {"tie_word_embeddings": False, "sliding_window": None, "rope_parameters": rope(base=1_000_000.0)},
        (*_SP_TOKENS, "[INST]", "[/INST]"),
        _SP_NAMED,
        templates.MISTRAL,
        "metaspace",
        "LlamaTokenizer",
        "SentencePiece, BOS, no pad token, system prompt in the last question",
        prefix=True,
    ),
    Family(
        "OLMo 2",
        "Olmo2Config",
        {"tie_word_embeddings": False, "rope_parameters": rope(base=500_000.0)},
        ("<|endoftext|>", "<|pad|>"),
        {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>", "pad": "<|pad|>"},
        templates.OLMO_2,
        "llama-bpe",
        "GPT2Tokenizer",
        "norms after each part only, QK norm over all heads",
        pre="dbrx",
    ),
    Family(
        "Granite",
        "GraniteConfig",
        {
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.125,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        {"bos": "<|end_of_text|>", "eos": "<|end_of_text|>", "unk": "<|end_of_text|>", "pad": "<|end_of_text|>"},
        templates.GRANITE,
        "smollm",
        "GPT2Tokenizer",
        "scaled embeddings, attention, residuals and logits; dated prompt",
        pre="refact",
    ),
    Family(
        "StableLM 2",
        "StableLmConfig",
        {
            "tie_word_embeddings": False,
            "use_qkv_bias": True,
            "partial_rotary_factor": 0.25,
            "rope_parameters": rope(partial_rotary_factor=0.25),
        },
        (*_CHATML_TOKENS, "<|user|>", "<|assistant|>", "<|system|>"),
        {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>", "pad": "<|endoftext|>"},
        templates.STABLE_LM,
        "qwen2",
        "GPT2Tokenizer",
        "layer norms with bias, a quarter of each head rotated, biases",
        pre="stablelm2",
        padding=16,
    ),
    Family(
        "Falcon 3",
        "LlamaConfig",
        {"tie_word_embeddings": False, "head_dim": 32, "rope_parameters": rope(base=1_000_042.0)},
        ("<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"),
        {"eos": "<|endoftext|>", "pad": "<|pad|>"},
        templates.FALCON_3,
        "llama-bpe",
        "PreTrainedTokenizerFast",
        "large heads, no BOS",
        pre="falcon3",
    ),
    Family(
        "GLM-4",
        "Glm4Config",
        {
            "tie_word_embeddings": False,
            "head_dim": HEAD_DIM,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "rope_parameters": rope(partial_rotary_factor=0.5),
            "pad_token_id": None,
        },
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        {"eos": "<|endoftext|>", "pad": "<|endoftext|>"},
        templates.GLM_4,
        "llama-bpe",
        "PreTrainedTokenizerFast",
        "four norms a layer, half of each head rotated in pairs, fused projections, the next turn ends an answer",
        pre="glm4",
        ends=("<|user|>", "<|observation|>"),
    ),
    Family(
        "Cohere Command R",
        "CohereConfig",
        {"tie_word_embeddings": True, "logit_scale": 0.25, "pad_token_id": 0},
        (
            "<PAD>",
            "<UNK>",
            "<CLS>",
            "<SEP>",
            "<MASK_TOKEN>",
            "<BOS_TOKEN>",
            "<EOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
        ),
        {"bos": "<BOS_TOKEN>", "eos": "<|END_OF_TURN_TOKEN|>", "pad": "<PAD>"},
        templates.COHERE,
        "smollm",
        "CohereTokenizer",
        "one layer norm without bias for attention and neurons side by side, scaled logits, rotated in pairs",
        prefix=True,
        pre="command-r",
    ),
    Family(
        "Qwen3-MoE",
        "Qwen3MoeConfig",
        {
            "tie_word_embeddings": False,
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
        _CHATML_TOKENS,
        _QWEN_NAMED,
        CHATML,
        "qwen2",
        "Qwen2Tokenizer",
        "a mixture of four experts in each layer, QK norm",
        pre="qwen2",
        padding=37,
    ),
    Family(
        "Mixtral",
        "MixtralConfig",
        {"tie_word_embeddings": False, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        _SP_TOKENS,
        _SP_NAMED,
        templates.MISTRAL,
        "metaspace",
        "LlamaTokenizer",
        "a mixture of four experts in each layer",
        prefix=True,
    ),
    Family(
        "GPT-2",
        "GPT2Config",
        {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT, "initializer_range": 0.15},
        ("<|endoftext|>",),
        {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
        templates.PLAIN,
        "gpt-2",
        "GPT2Tokenizer",
        "learnt positions, its own names of layers",
        pre="gpt-2",
        shape={},
    ),
    Family(
        "OPT",
        "OPTConfig",
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": NEURONS,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": CONTEXT,
            "init_std": 0.15,
        },
        ("<pad>", "</s>"),
        {"bos": "</s>", "eos": "</s>", "unk": "</s>", "pad": "<pad>"},
        templates.PLAIN,
        "gpt-2",
        "GPT2Tokenizer",
        "learnt positions, its own names of layers",
        pre="gpt-2",
        shape={},
    ),
    Family(
        "LFM2",
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        ("<|pad|>", "<|startoftext|>", *_CHATML_TOKENS),
        {"bos": "<|startoftext|>", "eos": "<|im_end|>", "pad": "<|pad|>"},
        "{{ bos_token }}" + CHATML,
        "llama-bpe",
        "PreTrainedTokenizerFast",
        "convolutions in some layers",
        prefix=True,
        pre="lfm2",
    ),
    Family(
        "Mamba",
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        ("<|endoftext|>",),
        {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>", "pad": "<|endoftext|>"},
        templates.PLAIN,
        "gpt-2",
        "GPT2Tokenizer",
        "a state instead of attention",
        pre="gpt-2",
        shape={},
    ),
)

# Families that `load` rejects.
REJECTED = {"GPT-2", "OPT", "LFM2", "Mamba"}


def config_of(family: Family, vocabulary: int = 512, **changes: Any) -> PretrainedConfig:
    """Returns the configuration of a tiny model.

    Args:
        family: the family.
        vocabulary: rows of the embedding table.
        changes: other settings.
    """
    import transformers

    kind = getattr(transformers, family.config)
    return kind(**{**family.shape, **family.settings, "vocab_size": vocabulary, **changes})


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """Returns the tokenizer, which is trained in a moment, with the chat template."""
    from transformers import PreTrainedTokenizerFast

    prefix = family.tokens["bos"] if family.prefix else None
    made = vocabularies.tokenizer(family.kind, family.special, prefix)
    named = {f"{name}_token": text for name, text in family.tokens.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **named)
    tokenizer.chat_template = family.template
    return tokenizer


def model_of(family: Family, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PreTrainedModel:
    """Returns a random model whose norms and biases differ from their initial values too."""
    import torch

    from lilliput.models import random_model

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    given = {key: value for key, value in ids.items() if key not in family.settings}
    config = config_of(family, len(tokenizer) + family.padding, **given)
    model = random_model(config, seed).eval()
    random = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            scale = 0.2 if name.endswith("bias") else 0.1
            parameter.data += scale * torch.randn(parameter.shape, generator=random)
    if family.ends:
        ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(family.ends))]
        model.generation_config.eos_token_id = ends
    return model


def write_source(family: Family, folder: Path, **saving: Any) -> Path:
    """Writes the source of `family` to `folder` as its publisher would, and returns it.

    Args:
        family: the family.
        folder: a new folder.
        saving: arguments of `save_pretrained`, such as the size of a shard.
    """
    import torch

    tokenizer = tokenizer_of(family)
    dtype = saving.pop("dtype", torch.float32)
    model_of(family, tokenizer).to(dtype).save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": family.tokenizer_class}))
    return folder
