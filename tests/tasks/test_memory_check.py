import json
import re

import pytest
import yaml

from lilliput.errors import ConfigError
from lilliput.memory import Machine
from tasks.process import accelerate as parallel
from tasks.process import memory_check as fit

GIB = 2**30
LARGE = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_params):
    """A folder in which `base` has eight billion parameters; a machine with 24 GiB."""
    monkeypatch.setattr(fit, "this_machine", lambda *shared: Machine(24 * GIB, 0, *shared))
    monkeypatch.delenv(parallel.SETTING, raising=False)
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "models/base/config.json").write_text(json.dumps(LARGE))
    return tmp_path


def test_all_that_cannot_fit_is_named_with_what_it_needs_and_what_there_is(project, tiny_params, monkeypatch):
    with pytest.raises(ConfigError) as refused:
        fit.require_memory(tiny_params, tiny_params.candidates, project)
    named = re.findall(
        r"^candidates\.(\w+): would take about (\d+\.\d) GiB of memory, of which there are 24\.0",
        str(refused.value),
        re.M,
    )
    assert [name for name, _ in named] == ["base", "lora", "pruned", "distilled", "pocket"]
    assert all(float(needed) > 24 for _, needed in named)
    assert "--ignore-memory" in str(refused.value)
    monkeypatch.setenv(fit.IGNORE, "1")
    fit.require_memory(tiny_params, tiny_params.candidates, project)


def test_what_is_unknown_or_fits_is_let_through(project, tiny_params, monkeypatch):
    fit.require_memory(tiny_params, tiny_params.candidates, project / "elsewhere")
    monkeypatch.setattr(fit, "this_machine", lambda *shared: Machine(512 * GIB, 0, *shared))
    fit.require_memory(tiny_params, tiny_params.candidates, project)


def test_the_nearest_that_is_made_tells_the_shape(project, tiny_params):
    assert fit.shape_of(tiny_params, "distilled", project).layers == 32
    (project / "models/pruned").mkdir()
    (project / "models/pruned/config.json").write_text(json.dumps(LARGE | {"num_hidden_layers": 16}))
    assert fit.shape_of(tiny_params, "distilled", project).layers == 16


def accelerate(folder, **settings):
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": "MULTI_GPU", "num_processes": 4, "use_cpu": False} | settings))
    return str(path)


def test_processes_are_started_for_trainings_alone(tmp_path, tiny_params, monkeypatch):
    monkeypatch.delenv(parallel.SETTING, raising=False)
    assert parallel.launcher(tiny_params, "lora") is None
    monkeypatch.setenv(parallel.SETTING, accelerate(tmp_path))
    assert parallel.launcher(tiny_params, "pruned") is None
    command = parallel.launcher(tiny_params, "lora")
    assert command[-3:] == ["--module", "tasks.compress", "lora"]
    assert "--multi_gpu" not in command
    monkeypatch.setenv(parallel.SETTING, accelerate(tmp_path, distributed_type="MULTI_CPU"))
    assert "--multi_gpu" in parallel.launcher(tiny_params, "distilled")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parallel.launcher(tiny_params, "lora") is None  # it is one of them


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_processes": 3}, "batch_size 4 cannot be shared out evenly among the 3 processes"),
        ({"distributed_type": "DEEPSPEED"}, "no file of `accelerate config`"),
        ({"num_processes": "many"}, "no file of `accelerate config`"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(tmp_path, tiny_params, monkeypatch, settings, told):
    monkeypatch.setenv(parallel.SETTING, accelerate(tmp_path, **settings))
    with pytest.raises(ConfigError, match=re.escape(told)):
        parallel.launcher(tiny_params, "lora")


def test_a_setting_that_names_no_file_is_refused(tmp_path, tiny_params, monkeypatch):
    monkeypatch.setenv(parallel.SETTING, str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="unset it to train in one process"):
        parallel.launcher(tiny_params, "lora")
