import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lilliput import models
from lilliput.memory import SHORT, Machine, Shape, answering_bytes, estimate, scoring_bytes
from lilliput.models import parameter_count
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


@pytest.mark.parametrize("name", ["base", "lora", "pruned", "distilled"])
def test_estimates_are_near_measurements(params, name):
    shape, teacher = (replace(SMALL, layers=26), SMALL) if name == "distilled" else (SMALL, None)
    expected = estimate(params.strategy_config(name), shape, SHORT, HOST, teacher)
    measured = json.loads((PROJECT / "costs" / f"{name}.json").read_text())["peak_rss_bytes"]
    assert 0.7 < expected.process_bytes / measured < 1.4


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
    assert copies.host_bytes == pytest.approx(4 * copies.process_bytes)


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
