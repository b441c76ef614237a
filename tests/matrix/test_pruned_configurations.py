"""Each value of a configuration that counts something follows its pruning; values of unknown meaning are reported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3MoeConfig

from lilliput.compress.prune import remove_layers
from lilliput.errors import StrategyError
from lilliput.models import random_model
from lilliput.shape import keep_layers, resized
from tests.matrix.families import FAMILIES, REJECTED, config_of

# Sizes that differ from each other, and their number after pruning.
LAYERS, HEADS, KV_HEADS, HIDDEN, NEURONS = 6, 8, 4, 128, 192
SIZES = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
}
LEFT = {"block_influence": 4, "neurons": 96, "kv_groups": 2, "query_heads": 1, "hidden": 64}
# The values that each method changes, by the names in the configuration.
FOLLOW = {
    "block_influence": {"num_hidden_layers", "layer_types", "no_rope_layers", "max_window_layers"},
    "neurons": {"intermediate_size"},
    "kv_groups": {"num_attention_heads", "num_key_value_heads"},
    "query_heads": {"num_attention_heads"},
    "hidden": {"hidden_size"},
}
# Numbers and lists that count nothing that can be pruned, and why.
CONSTANT = {
    "head_dim": "channels of a head, which no method prunes",
    "query_pre_attn_scalar": "a factor",
    "vocab_size": "tokens, which no method prunes",
    "bos_token_id": "a token",
    "eos_token_id": "tokens",
    "pad_token_id": "a token",
    "max_position_embeddings": "positions",
    "original_max_position_embeddings": "positions",
    "sliding_window": "positions",
    "_sliding_window_pattern": "only for configurations without layer_types",
    "no_rope_layer_interval": "only for configurations without no_rope_layers",
    "short_factor": "one for each pair of rotated channels",
    "long_factor": "one for each pair of rotated channels",
    "pretraining_tp": "devices",
    "chunk_size_feed_forward": "tokens at once",
    "LABEL_0": "of classifiers",
    "LABEL_1": "of classifiers",
    "architectures": "names",
    "keys_to_ignore_at_inference": "names",
    "decoder_sparse_step": "every layer is a mixture",
    "mlp_only_layers": "empty",
    "moe_intermediate_size": "neurons of an expert, which no method prunes",
    "num_local_experts": "experts",
    "num_experts_per_tok": "experts",
}


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the numbers and lists in a configuration with the last part of their names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, key)
    elif isinstance(value, list) or (isinstance(value, int) and not isinstance(value, bool)):
        yield name, value


SUPPORTED = [family for family in FAMILIES if family.name not in REJECTED]


@pytest.mark.parametrize("method", LEFT)
@pytest.mark.parametrize("family", SUPPORTED, ids=lambda family: family.slug)
def test_every_count_follows_and_nothing_else_changes(family, method):
    lists = {"no_rope_layers": [1, 1, 1, 0, 1, 1]} if "no_rope_layers" in family.settings else {}
    config = config_of(family, **SIZES, **lists)
    before = dict(numbers(config.to_dict()))
    unknown = before.keys() - CONSTANT.keys() - set().union(*FOLLOW.values())
    assert not unknown, f"values of unknown meaning in the configuration of {family.name}: {sorted(unknown)}"
    after = dict(numbers(resized(config, method, LEFT[method]).to_dict()))
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= FOLLOW[method]
    follow = {name for name in FOLLOW[method] & before.keys() if _counts(before[name], method)}
    assert changed == follow, f"{sorted(follow - changed)} stay as they were"


def _counts(value: Any, method: str) -> bool:
    """Whether a value counts or lists the layers of this configuration; other methods' values always count."""
    return method != "block_influence" or (len(value) == LAYERS if isinstance(value, list) else value <= LAYERS)


def test_lists_and_numbers_of_layers_follow_the_layers_that_are_kept():
    windows = Qwen2Config(num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    keep_layers(windows, [1, 2, 3])
    assert windows.max_window_layers == 1
    assert windows.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    mixture = Qwen3MoeConfig(num_hidden_layers=4, mlp_only_layers=[0, 2])
    keep_layers(mixture, [1, 2, 3])
    assert (mixture.num_hidden_layers, mixture.mlp_only_layers) == (3, [1])


def test_a_list_for_each_layer_of_unknown_meaning_is_rejected_before_any_change():
    config = LlamaConfig(num_hidden_layers=3, hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=8)
    config.gates_of_layers = [0.1, 0.2, 0.3]
    model = random_model(config, seed=0)
    with pytest.raises(StrategyError, match="gates_of_layers in the configuration of a llama has one entry for each"):
        remove_layers(model, [1])
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
