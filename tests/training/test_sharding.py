"""Our loss on a model sharded by FSDP 2 as accelerate wraps it, in two processes with gloo.

accelerate itself shards only on accelerators; a whole training with it is in tests/tasks/test_processes.py (gpu).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lilliput.data.questions import write_questions

PROJECT = Path(__file__).resolve().parent.parent.parent
GRADIENTS = """
import copy, sys
from pathlib import Path
from types import SimpleNamespace
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from lilliput.compress.lora import with_adapter
from lilliput.training.loop import _answer_tokens, _gather, _WithLoss
from lilliput.training.examples import collate, encode_examples
from lilliput.training.answer_loss import label_loss
from lilliput.params import load_params
from lilliput.data.questions import read_questions
from lilliput.models import open_model

checkpoint, questions, params = map(Path, sys.argv[1:])
dist.init_process_group("gloo")
config = load_params(params).strategy_config("lora")
opened, tokenizer = open_model(checkpoint)
batch = collate(encode_examples(tokenizer, "Answer briefly.", read_questions(questions)[:8]), 2)
mine = {name: rows.chunk(2)[dist.get_rank()] for name, rows in batch.items()}
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
)
accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True)
for model in (with_adapter(copy.deepcopy(opened), config), opened):
    whole, learner = copy.deepcopy(model), copy.deepcopy(model)
    label_loss(whole, batch).backward()
    sharded = fsdp2_prepare_model(accelerator, _WithLoss(learner, label_loss))
    (sharded(**mine) * _answer_tokens(mine) / _answer_tokens(batch) * 2).backward()
    expected = {name: weight.grad for name, weight in whole.named_parameters() if weight.grad is not None}
    actual = {name: part.grad.full_tensor() for name, part in learner.named_parameters() if part.grad is not None}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(actual[name], gradient, rtol=1e-3, atol=1e-6), name
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.zero_()
    _gather(learner, model)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, dict(whole.named_parameters())[name]), name
dist.destroy_process_group()
"""


@pytest.mark.night
def test_gradients_and_weights_of_a_sharded_model_equal_those_of_the_whole(checkpoint, facts, tmp_path):
    write_questions(tmp_path / "questions.jsonl", facts)
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [tmp_path / "gradients.py", checkpoint, tmp_path / "questions.jsonl", PROJECT / "examples/tiny.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_FSDP": "true"}
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
