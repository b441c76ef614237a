"""The real auto-gptq 0.7.1 opens our export; `make interop` creates an environment for it."""

import json
import os
import subprocess

import pytest
import torch

from lilliput.compile.autogptq import compile_autogptq
from lilliput.config import AutogptqTarget
from lilliput.models import open_model
from lilliput.saving import PROBE_TEXT

pytestmark = pytest.mark.interop

OPEN = """
import json, sys, torch
from auto_gptq import AutoGPTQForCausalLM
model = AutoGPTQForCausalLM.from_quantized(
    sys.argv[1], device="cpu", use_triton=False, disable_exllama=True, disable_exllamav2=True, torch_dtype=torch.float32
)
ids = json.loads(sys.argv[2])
with torch.inference_mode():
    logits = model.model(torch.tensor([ids])).logits[0].float()
json.dump(logits.tolist(), open(sys.argv[3], "w"))
"""


def test_auto_gptq_opens_what_we_export(quantised, tmp_path):
    python = os.environ.get("LILLIPUT_AUTOGPTQ_PYTHON")
    if not python:
        pytest.skip("no auto-gptq; run `make interop`, which creates an environment for it")
    folder = tmp_path / "export"
    folder.mkdir()
    compile_autogptq(quantised(), folder, AutogptqTarget(candidate="small", target="autogptq"))
    model, tokenizer = open_model(quantised())
    ids = tokenizer(PROBE_TEXT)["input_ids"]
    output = tmp_path / "logits.json"
    done = subprocess.run(
        [python, "-c", OPEN, str(folder), json.dumps(ids), str(output)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.tensor(json.loads(output.read_text()))
    with torch.inference_mode():
        ours = model(torch.tensor([ids])).logits[0]
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= 0.95
    assert (ours - theirs).abs().mean() < 0.1
