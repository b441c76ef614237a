"""Types by llama.cpp's rules: those that `llama_model_quantize` itself gave the matrices of three models.

tests/recorded/llama_quantize.json has them by part of a layer, one for all layers or a list; recorded with the
llama.cpp of node-llama-cpp 3.22.1, with and without an importance matrix.
"""

import json
from pathlib import Path

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lilliput.ggml.rules import (
    LARGE_BLOCK,
    NAMES,
    Decoder,
    Matrix,
    Part,
    bits_per_weight,
    fits,
    fitting_type,
    matrix_type,
    problem,
)

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "llama_quantize.json").read_text())
# Layers, query heads by key-value head, tied embeddings; widths of the hidden state and of the feed-forward part.
MODELS = {"wide": (18, 2, True, 256, 512), "grouped": (9, 4, False, 256, 512), "narrow": (9, 3, True, 96, 288)}
PARTS = {
    "attn_q": Part.QUERY,
    "attn_k": Part.KEY,
    "attn_v": Part.VALUE,
    "attn_output": Part.ATTENTION_OUTPUT,
    "ffn_gate": Part.GATE,
    "ffn_up": Part.UP,
    "ffn_down": Part.DOWN,
    "token_embd": Part.TABLE,
    "output": Part.OUTPUT,
}


def matrices(model: str) -> list[Matrix]:
    layers, _, tied, hidden, neurons = MODELS[model]
    outside = [Matrix(Part.TABLE, hidden)] + ([] if tied else [Matrix(Part.OUTPUT, hidden)])
    inside = [part for part in Part if part not in {Part.TABLE, Part.OUTPUT}]
    widths = {part: neurons if part is Part.DOWN else hidden for part in inside}
    return outside + [Matrix(part, widths[part], layer) for layer in range(layers) for part in inside]


def decoder(model: str) -> Decoder:
    return Decoder(*MODELS[model][:3])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_types_are_those_of_llama_cpp(model, name):
    for kind, expected in RECORDED[model][name].items():
        importance = kind == "importance"
        found = {
            (matrix.part, matrix.layer): fitting_type(
                matrix_type(name, matrix, decoder(model), importance=importance), matrix.width
            )
            for matrix in matrices(model)
        }
        assert expected.keys() == {part for part in PARTS if (PARTS[part], 0) in found}
        for part, types in expected.items():
            layers = sorted(layer for found_part, layer in found if found_part is PARTS[part])
            every = [types] * len(layers) if isinstance(types, str) else types
            assert [found[PARTS[part], layer] for layer in layers] == every, (part, kind)


@pytest.mark.parametrize("name", NAMES)
def test_each_type_works_or_is_rejected_for_the_width(name):
    def reason(model: str, *, falls_back: bool = False) -> str | None:
        return problem(name, matrices(model), decoder(model), importance=True, falls_back=falls_back)

    assert reason("wide") is None
    assert reason("narrow", falls_back=True) is None
    message = reason("narrow")
    possible = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"]
    if name in possible:
        assert message is None
    else:
        assert message is not None
        assert f"type {name} needs rows of a multiple of {LARGE_BLOCK} weights, but layers have 96, 288" in message
        assert f"choose one of {', '.join(possible)}, or set other_widths: fallback" in message


def test_widths_of_half_blocks_are_rejected_even_with_other_types():
    odd = [Matrix(Part.TABLE, 72), Matrix(Part.QUERY, 72)]
    message = problem("Q8_0", odd, Decoder(1, 1, tied=True), importance=False, falls_back=True)
    assert message is not None
    assert "rows of a multiple of 32 weights, but layers have 72 inputs; prune to a multiple of 32" in message


def test_importance_decides_whether_a_type_fits():
    """Without importance llama.cpp gives the first feed-forward layers Q5_K, which needs wide rows."""
    many = [Matrix(Part.DOWN, 96, layer) for layer in range(8)]
    assert fits("IQ4_NL", many, Decoder(8, 1, tied=True), importance=True)
    assert not fits("IQ4_NL", many, Decoder(8, 1, tied=True), importance=False)


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_most_matrices(name):
    query = matrix_type(name, Matrix(Part.QUERY, 256), decoder("wide"), importance=True)
    weights, size_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[query]]
    assert bits_per_weight(name) == 8 * size_bytes / weights
