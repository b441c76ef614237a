import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.memory import SHAPES
from lilliput import models
from lilliput.decoders import parameter_count
from lilliput.machine import Machine
from lilliput.memory import SHORT, ExampleTokens, Shape, answering_bytes, estimate, fits_in_float32, scoring_bytes
from lilliput.params import load_params

PROJECT = Path(__file__).resolve().parent.parent
GIB = 2**30
SMALL = Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True)  # SmolLM2-135M
LARGE = Shape(32, 4096, 14336, 32, 8, 128, 128256, tied=False)  # Llama-3.1-8B
HOST, GPU = Machine(24 * GIB), Machine(64 * GIB, 24 * GIB)


@pytest.fixture(scope="module")
def params():
    return load_params(PROJECT / "params.yaml")


def test_parameters_equal_those_of_the_model(opened):
    assert Shape.of(opened[0].config.to_dict()).parameters == parameter_count(opened[0])
    assert SMALL.parameters == 134_515_008
    assert LARGE.parameters == 8_030_261_248
    assert Shape.of({"n_embd": 768}) is None


RECORD = json.loads((PROJECT / "benchmarks" / "results" / "memory.json").read_text())
STRATEGIES = {"load", "lora", "prune", "sparsify", "distill", "rtn", "awq", "gptq"}


@pytest.mark.parametrize(
    "row",
    [row for row in RECORD["rows"] if row["code"] == "now" and row["stage"] in STRATEGIES],
    ids=lambda row: "-".join(map(str, (row["shape"], row["layers"], row["stage"], *row["settings"].values()))),
)
def test_estimates_are_within_15_percent_of_measured_peaks(tiny_params, row):
    hidden, _, heads, kv_heads, neurons, vocabulary, tied = SHAPES[row["shape"]]
    shape = Shape(row["layers"], hidden, neurons, heads, kv_heads, hidden // heads, vocabulary, tied)
    assert round(shape.parameters / 1e6, 1) == row["million_parameters"]
    config = getattr(tiny_params.strategies, row["stage"])
    settings = {"rank": 16} | row["settings"] if row["stage"] == "lora" else row["settings"]
    expected = estimate(config.model_copy(update=settings), shape, ExampleTokens(**RECORD["text"]), HOST, shape)
    assert expected.host_bytes / 2**20 == pytest.approx(row["without_files_mib"], rel=0.15)
    assert expected.process_bytes / 2**20 == pytest.approx(row["process_mib"], rel=0.15)


def test_a_converted_source_is_opened_in_float32(params):
    """The default source is a GGUF file; its recorded peak is of a real run."""
    expected = estimate(params.strategies.load, SMALL, SHORT, HOST, converts=True)
    measured = json.loads((PROJECT / "costs" / "base.json").read_text())["peak_rss_bytes"]
    assert expected.process_bytes == pytest.approx(measured, rel=0.15)


def test_only_a_model_that_exceeds_the_memory_is_evaluated_as_stored():
    assert fits_in_float32(SMALL, Machine(2 * GIB))
    assert not fits_in_float32(LARGE, HOST)
    assert fits_in_float32(LARGE, Machine(64 * GIB))
    assert fits_in_float32(None, Machine(GIB))


def test_the_default_graph_fits_into_eight_gib(params):
    for name, spec in params.candidates.items():
        teacher = SMALL if spec.teacher else None
        assert estimate(params.strategy_config(name), SMALL, SHORT, Machine(8 * GIB), teacher).host_bytes < 6 * GIB


def test_training_moves_to_the_gpu_and_sharding_divides_it(params):
    config = params.strategy_config("distilled")
    alone, on_gpu = (estimate(config, LARGE, SHORT, machine) for machine in (HOST, GPU))
    four = estimate(config, LARGE, SHORT, replace(GPU, processes=4, sharded=True))
    copies = estimate(config, LARGE, SHORT, replace(GPU, processes=4))
    assert alone.gpu_bytes == 0
    assert on_gpu.gpu_bytes > 4 * 4 * LARGE.parameters > on_gpu.process_bytes
    assert four.gpu_bytes < on_gpu.gpu_bytes / 2
    assert copies.gpu_bytes > 0.9 * on_gpu.gpu_bytes
    assert 3.9 * copies.process_bytes < copies.host_bytes < 4 * copies.process_bytes


def test_gptq_of_eight_billion_parameters_fits_one_gpu(params):
    assert estimate(params.strategy_config("gptq"), LARGE, SHORT, GPU).gpu_bytes < 24 * GIB


def test_qlora_is_needed_to_tune_eight_billion_parameters_on_one_gpu(params):
    config = params.strategy_config("lora")
    assert estimate(config, LARGE, SHORT, GPU).gpu_bytes > 24 * GIB
    assert (
        estimate(config.model_copy(update={"variant": "qlora", "batch_size": 4}), LARGE, SHORT, GPU).gpu_bytes
        < 24 * GIB
    )


def test_scoring_grows_with_prompts_and_options():
    assert answering_bytes(SMALL, 8, 100, 20) == 8 * answering_bytes(SMALL, 1, 100, 20)
    assert scoring_bytes(SMALL, 40, 512, 64) > scoring_bytes(SMALL, 40, 256, 32)


def test_a_model_too_large_for_the_gpu_stays_on_the_host(monkeypatch):
    monkeypatch.setattr(models, "device", lambda: torch.device("cuda"))
    layer = torch.nn.Linear(10, 10, bias=False)  # 400 bytes
    for free, kind in ((400, "cpu"), (500, "cuda")):
        monkeypatch.setattr(models, "free_bytes", lambda device, free=free: free)
        assert models._device_for(layer).type == kind
