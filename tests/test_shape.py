import pytest
from transformers import LlamaConfig

from lilliput.config import PruneConfig
from lilliput.decoders import parameter_count
from lilliput.errors import StrategyError
from lilliput.models import random_model
from lilliput.shape import linear_inputs, parameters, pruned, resized, size, weights_read_per_token

SHAPE = LlamaConfig(
    num_hidden_layers=3,
    hidden_size=48,
    intermediate_size=64,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=100,
    pad_token_id=0,
    tie_word_embeddings=False,
)


def prune_shape(method, by, value, multiple=4, weight_bytes=2):
    settings = PruneConfig(method=method, amount={"by": by, "value": value}, multiple=multiple, calibration_examples=1)
    return pruned(SHAPE, settings, weight_bytes)


def test_parameters_equal_those_of_the_model():
    assert parameters(SHAPE) == parameter_count(random_model(SHAPE, seed=0))
    assert (
        parameters(SHAPE) - weights_read_per_token(SHAPE) == 100 * 48
    )  # an embedding table is looked up, not read whole


@pytest.mark.parametrize(
    ("method", "by", "value", "expected"),
    [
        ("block_influence", "removed_count", 1, 2),
        ("neurons", "removed_share", 0.3, 44),  # 44.8, to a multiple of 4
        ("kv_groups", "removed_share", 0.5, 1),
        ("query_heads", "removed_count", 1, 2),
        ("hidden", "removed_share", 0.3, 36),  # 33.6, to a multiple of 4 that 6 heads divide
    ],
)
def test_pruned_sizes_by_method(method, by, value, expected):
    assert size(prune_shape(method, by, value), method) == expected


def test_heads_are_removed_by_group_or_evenly_and_keep_their_size():
    groups, heads = prune_shape("kv_groups", "removed_count", 1), prune_shape("query_heads", "removed_count", 1)
    assert (groups.num_attention_heads, groups.num_key_value_heads, groups.head_dim) == (3, 1, 8)
    assert (heads.num_attention_heads, heads.num_key_value_heads, heads.head_dim) == (4, 2, 8)
    assert linear_inputs(groups) == (24, 48, 64)
    assert SHAPE.num_attention_heads == 6


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("block_influence", [1, 2]),
        ("neurons", range(4, 64, 4)),
        ("kv_groups", [1]),
        ("query_heads", [1, 2]),
        ("hidden", [12, 24, 36]),  # multiples of 4 that 6 heads divide
    ],
)
@pytest.mark.parametrize(
    ("by", "value"), [("kept_parameters", 0.85), ("kept_latency_estimate", 0.85), ("kept_mib", 0.09)]
)
def test_pruning_keeps_as_much_as_the_limit_allows(method, sizes, by, value):
    cost = weights_read_per_token if by == "kept_latency_estimate" else parameters
    limit = value * 2**20 / 2 if by == "kept_mib" else value * cost(SHAPE)
    fitting = [units for units in sizes if cost(resized(SHAPE, method, units)) <= limit]
    assert size(prune_shape(method, by, value), method) == max(fitting)


@pytest.mark.parametrize(
    ("method", "by", "value", "message"),
    [
        (
            "block_influence",
            "removed_count",
            3,
            "leaves 0 of 3 layers; choose `value: 2` .leaves 1., `value: 1` .leaves 2.",
        ),
        ("block_influence", "removed_count", 9, "leaves 0 of 3 layers"),
        ("neurons", "removed_share", 0.02, "leaves 64 of 64 neurons per layer; choose, among others, `value: 0.938`"),
        ("neurons", "removed_count", 3, "leaves 61 of 64 neurons"),
        ("hidden", "removed_count", 8, "leaves 40 of 48 hidden channels.*leaves 12.*leaves 24.*leaves 36.$"),
        ("neurons", "kept_parameters", 0.1, "leaves 0 of 64 neurons"),
        ("neurons", "kept_mib", 100, "leaves 64 of 64 neurons"),
    ],
)
def test_impossible_amounts_are_rejected_with_possible_ones(method, by, value, message):
    with pytest.raises(StrategyError, match=f"strategies.prune.amount: {by} {value} {message}"):
        prune_shape(method, by, value)
