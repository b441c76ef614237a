"""A training in two processes, run by the stage's command, equals the training in one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lilliput.artifacts import read_manifest, seal
from lilliput.data.questions import write_questions

pytestmark = pytest.mark.night

PROJECT = Path(__file__).resolve().parent.parent.parent
ON_CPU = {"distributed_type": "MULTI_CPU", "use_cpu": True, "num_processes": 2, "num_machines": 1, "machine_rank": 0}
ON_CPU |= {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no"}


@pytest.fixture
def made(checkpoint, facts, tmp_path):
    """Returns a function that trains `lora` in a new folder and returns the folder."""

    def make(name, accelerate=None, **settings):
        folder = tmp_path / name
        shutil.copytree(checkpoint, folder / "models/base")
        seal(folder / "models/base", candidate="base", strategy="load", config={}, parent=None, parameters=1, facts={})
        (folder / "data").mkdir()
        for file in ("train", "calibration", "questions"):
            write_questions(folder / "data" / f"{file}.jsonl", facts)
        params = yaml.safe_load((PROJECT / "examples/tiny.yaml").read_text())
        params["strategies"]["lora"] |= {"gradient_accumulation": 2} | settings
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "LILLIPUT_SHARE_MACHINE": "1"}
        if accelerate:
            (folder / "accelerate.yaml").write_text(yaml.safe_dump(accelerate))
            environment["LILLIPUT_ACCELERATE"] = "accelerate.yaml"
        command = [sys.executable, "-m", "tasks", "compress", "lora"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        return folder, done

    return make


def test_two_processes_train_the_same_model_as_one_and_one_of_them_writes(made):
    (one, done), (two, both) = made("one"), made("two", ON_CPU)
    assert (done.returncode, both.returncode) == (0, 0), done.stderr + both.stderr
    alone, shared = (load_file(folder / "models/lora/model.safetensors") for folder in (one, two))
    before = load_file(one / "models/base/model.safetensors")
    step = max((alone[name].float() - before[name].float()).abs().max().item() for name in alone)
    for name, weight in alone.items():
        assert torch.allclose(shared[name].float(), weight.float(), rtol=0.01, atol=step / 100), name
    assert read_manifest(two / "models/lora").facts["processes"] == 2
    assert "processes" not in read_manifest(one / "models/lora").facts
    assert sorted(path.name for path in (two / "models").iterdir() if not path.name.startswith(".")) == ["base", "lora"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_sharded_across_gpus_trains_the_same_as_in_one_process(made):
    sharding = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
    }
    sharding |= {"fsdp_cpu_ram_efficient_loading": False, "fsdp_state_dict_type": "FULL_STATE_DICT"}
    sharded = ON_CPU | {"distributed_type": "FSDP", "use_cpu": False, "fsdp_config": sharding}
    (one, done), (two, both) = made("one"), made("two", sharded)
    assert (done.returncode, both.returncode) == (0, 0), done.stderr + both.stderr
    alone, shared = (load_file(folder / "models/lora/model.safetensors") for folder in (one, two))
    for name, weight in alone.items():
        assert torch.allclose(shared[name].float(), weight.float(), rtol=0.02, atol=1e-3), name


def test_errors_in_the_processes_are_reported(made):
    _, done = made("wrong", ON_CPU, validation_share=0.01)
    assert done.returncode == 2
    assert "validation_share: 0.01 of 20 training groups leaves nothing to validate" in done.stderr
    assert "Traceback" not in done.stderr
