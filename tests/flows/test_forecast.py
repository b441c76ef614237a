"""A plan without measurements: costs from the shape, held against the records of the default model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.engine import forecast
from flows.engine.plan import NOT_BUILT, PlannedStage, Prediction, _reason
from flows.engine.plan_output import device_fits, plan_record, print_plan
from flows.engine.stage import Stage
from lilliput.errors import SourceError
from lilliput.memory import Shape
from lilliput.params import load_params
from tasks import layout
from tasks.process.source_shape import require_source, source_shape
from tests.flows.conftest import PROJECT

PARAMS = load_params(PROJECT / "params.yaml")
CORES = 2  # of the machine that made the records
MIB = 2**20


def model(params=PARAMS) -> forecast.Model:
    shape = source_shape(params, Path("nowhere"))
    assert shape
    return forecast.Model(params, shape, CORES)


def recorded(kind: str, name: str) -> dict:
    return json.loads((PROJECT / layout.RECORDS[kind](name)).read_text())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in ("compress", "evaluate") for name in PARAMS.candidates),
        *((kind, name) for kind in ("compile", "devices") for name in PARAMS.compile),
        ("offload", "phone-4gb"),
    ],
)
def test_times_of_the_default_model_are_within_a_factor_of_two(kind, name):
    measured = recorded(kind, name)
    assert 0.5 < forecast.seconds(kind, name, model()) / measured["seconds"] < 2.0
    if peak := forecast.peak_bytes(kind, name, model()):
        assert 0.6 < peak / measured["peak_rss_bytes"] < 1.7


@pytest.mark.parametrize("name", PARAMS.compile)
def test_sizes_of_compiled_models_are_within_five_percent(name):
    predicted = forecast.compiled_bytes(PARAMS.compile[name], model())
    assert predicted == pytest.approx(recorded("devices", name)["size_bytes"], rel=0.05)


def test_a_larger_model_or_more_steps_take_longer_and_more_cores_less():
    large = Shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True)
    usual = forecast.seconds("compress", "lora", model())
    assert forecast.seconds("compress", "lora", forecast.Model(PARAMS, large, CORES)) > 5 * usual
    assert forecast.seconds("compress", "lora", forecast.Model(PARAMS, model().source, 8)) < usual / 3


def test_a_device_that_nothing_fits_is_named(capsys):
    large = forecast.Model(PARAMS, Shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True), CORES)
    fits = {(fit.device, fit.name): fit.fits for fit in device_fits(large)}
    assert not fits["phone-4gb", "pocket-gguf"]
    assert fits["laptop", "pocket-gguf"]
    print_plan([], device_fits(large))
    assert "phone-4gb: warning: nothing is expected to fit: lora-gguf (~" in capsys.readouterr().out
    assert device_fits(None) == []


@pytest.mark.parametrize(
    ("changes", "recorded_before", "stale_inputs", "expected"),
    [
        ([], True, [], None),
        (["params.yaml: new", "models/a: deleted"], False, [], NOT_BUILT),
        (["models/a: deleted"], True, [], NOT_BUILT),
        (["models/parent: deleted", "models/a: deleted"], True, ["compress@parent"], NOT_BUILT),
        (["models/parent: deleted"], True, ["compress@parent"], "follows compress@parent"),
        (
            ["params.yaml: strategies.gptq modified", "models/a: deleted"],
            True,
            [],
            "params.yaml: strategies.gptq modified",
        ),
        ([], True, ["data"], "follows data"),
    ],
)
def test_a_result_that_is_not_there_is_not_built_yet(changes, recorded_before, stale_inputs, expected):
    stage = Stage("compress@a", "python", "", outputs=("models/a",))
    assert _reason(stage, changes, recorded_before, stale_inputs) == expected


def test_the_table_marks_estimates_and_fits_80_columns(capsys):
    stage = Stage("compress@a-candidate-with-a-name-of-forty-characters", "python", "")
    planned = [
        PlannedStage(stage, "lilliput/compress/through_rounding.py: modified", Prediction(600.0, 3 * MIB, "x", True)),
        PlannedStage(stage, NOT_BUILT, Prediction(60.0, 2 * MIB, "itself")),
        PlannedStage(stage, NOT_BUILT, None),
        PlannedStage(stage, None, None),
    ]
    print_plan(planned)
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    assert "~10 min" in output
    assert " 60 s" in output
    assert "1 of 4 stages are up to date" in output
    assert "3 stages would run: about 11 min, 3 MiB at the peak; 1 stage of unknown time." in output


def test_the_plan_as_json(capsys):
    planned = [PlannedStage(Stage("data", "python", ""), NOT_BUILT, Prediction(5.0, 0, "the model's shape", True))]
    print_plan(planned, data="9 rows", as_json=True)
    record = json.loads(capsys.readouterr().out)
    assert record == plan_record(planned, [], "9 rows")
    assert record["stages"] == [
        {
            "stage": "data",
            "reason": "not built yet",
            "seconds": 5.0,
            "peak_mib": None,
            "estimated": True,
            "source": "the model's shape",
        }
    ]


def with_source(tmp_path, **source):
    path = tmp_path / "short.yaml"
    path.write_text(json.dumps({"source": source}))
    return load_params(path)


def test_the_shape_of_a_local_checkpoint_is_known_before_it_is_fetched(tmp_path):
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"vocab_size": 100}))
    shape = source_shape(with_source(tmp_path, model=f"path:{tmp_path}"), tmp_path / "results")
    assert shape == Shape(2, 64, 128, 4, 4, 16, 100, tied=False)
    assert source_shape(with_source(tmp_path, model="hub:org/model"), tmp_path / "results") is None


def test_a_local_model_is_checked_before_anything_runs(tmp_path):
    with pytest.raises(SourceError, match=r"no such folder .*; correct the path"):
        require_source(with_source(tmp_path, model=f"path:{tmp_path / 'none'}").source)
    with pytest.raises(SourceError, match=r"has no \.safetensors file; convert"):
        require_source(with_source(tmp_path, model=f"path:{tmp_path}").source)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(SourceError, match=r"name one with source\.file: a\.gguf"):
        require_source(with_source(tmp_path, model=f"path:{tmp_path}").source)
    require_source(with_source(tmp_path, model=f"path:{tmp_path}", file="a.gguf").source)
    with pytest.raises(SourceError, match=r"b\.gguf is not in"):
        require_source(with_source(tmp_path, model=f"path:{tmp_path}", file="b.gguf").source)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(SourceError, match="`mamba`"):
        require_source(with_source(tmp_path, model=f"path:{tmp_path}").source)
