"""Blocks have the bytes of ggml: those of its Python reference, and those that libgguf 0.2.2 wrote (Apache-2.0)."""

import hashlib

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from lilliput.errors import StrategyError
from lilliput.ggml.quantiser import quantise

# sha256 of libgguf's bytes for the layer below by type, without and with importance.
WRITTEN = (
    ("Q2_K", "7378cc0e9f90", "4e201c614a2f"),
    ("Q3_K", "9aa6c2a3fa0e", "7089dadaaddb"),
    ("Q4_0", "63030e92fbae", "41edd1f6ada5"),
    ("Q4_1", "7b40bf8ed893", "4bc4ccb9ffec"),
    ("Q4_K", "1c63cf2f7317", "016264008383"),
    ("Q5_0", "fad4866a2402", "1b8b379d89af"),
    ("Q5_1", "9c47ff90a14a", "1a71d3863361"),
    ("Q5_K", "4a270f460f91", "5664860a094a"),
    ("Q6_K", "24e4f257e857", "07523c1ce803"),
    ("Q8_0", "6764b343645a", "6764b343645a"),
    ("IQ3_S", "9fb0bfce3b2f", "b280a7f28bec"),
    ("IQ4_NL", "8dccd7403633", "b34992aeb8a7"),
    ("IQ4_XS", "2270a121cdfc", "5c7e890bbebb"),
)


def layer() -> tuple[np.ndarray, np.ndarray]:
    """Returns a weight (16, 512), and the importance of its inputs."""
    draw = np.random.default_rng(7)
    weight = (draw.standard_normal((16, 512)) * draw.uniform(0.1, 1, 512)).astype(np.float32)
    return weight, draw.uniform(0.01, 4, 512).astype(np.float32)


def sha256(blocks: np.ndarray) -> str:
    return hashlib.sha256(blocks.tobytes()).hexdigest()[:12]


@pytest.mark.parametrize(("name", "plain", "weighted"), WRITTEN, ids=[row[0] for row in WRITTEN])
def test_writes_the_bytes_of_libgguf(name, plain, weighted):
    weight, importance = layer()
    assert sha256(quantise(weight, Type[name])) == plain
    assert sha256(quantise(weight, Type[name], importance)) == weighted


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_writes_the_bytes_of_ggufs_python_code(name):
    weight, _ = layer()
    assert np.array_equal(quantise(weight, Type[name]), quantize(weight, Type[name]))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "IQ4_NL"])
def test_threads_change_nothing(name):
    weight, importance = layer()
    alone = quantise(weight[:7], Type[name], importance)
    assert np.array_equal(quantise(weight[:7], Type[name], importance, threads=3), alone)
    assert np.array_equal(quantise(weight[:1], Type[name], importance, threads=3), alone[:1])


@pytest.mark.parametrize("name", ["Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "IQ4_NL", "IQ4_XS"])
def test_importance_lowers_the_weighted_error(name):
    weight, importance = layer()

    def error(blocks: np.ndarray) -> float:
        return float(((dequantize(blocks, Type[name]) - weight) ** 2 @ importance).sum())

    assert error(quantise(weight, Type[name], importance)) < 0.97 * error(quantise(weight, Type[name]))


def test_rejects_what_ggml_would_end_the_process_for():
    weight, importance = layer()
    with pytest.raises(StrategyError, match=r"IQ2_XS: ggml needs importance to write it; set importance: true"):
        quantise(weight, Type.IQ2_XS)
    with pytest.raises(StrategyError, match="one finite, positive number for each input"):
        quantise(weight, Type.Q4_0, -importance)
    with pytest.raises(StrategyError, match="one finite, positive number for each input"):
        quantise(weight, Type.Q4_0, importance[:-1])
    weight[3, 3] = np.nan
    with pytest.raises(StrategyError, match="a weight is NaN or infinite"):
        quantise(weight, Type.IQ4_NL, importance)
