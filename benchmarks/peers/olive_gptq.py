"""Olive's own GPTQ pass: `olive_gptq.py <job.json>`, in Olive's environment."""

import json
import sys
from pathlib import Path

import torch
from olive.data.registry import Registry
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.gptq import Gptq
from safetensors.torch import save_file
from usage import folder_bytes, so_far, tell

job = json.loads(Path(sys.argv[1]).read_text())


@Registry.register_dataset()
def calibration_rows(**_):
    """One text a sample, as Olive's own calibration takes them, without padding."""
    rows = [torch.tensor([ids]) for ids in job["calibration"]]
    return [({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids) for ids in rows]


config = {
    "bits": job["bits"],
    "group_size": job["group_size"],
    "sym": job["symmetric"],
    "data_config": {
        "name": "calibration",
        "load_dataset_config": {"type": "calibration_rows"},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "post_process_data_config": {"type": "skip_post_process"},
        "dataloader_config": {"type": "no_auto_batch_dataloader"},
    },
}
target = job["target"] + "/olive"
source = HfModelHandler(job["model"], load_kwargs={"torch_dtype": "float32"})
made = create_pass_from_dict(Gptq, config, disable_search=True).run(source, target)
used, size = so_far(), folder_bytes(target)

# Outside the measurement: the weights as its own layers compute with them, for one judge of all.
model = made.load_model().eval()
weights = {}
with torch.no_grad():
    for name, layer in model.named_modules():
        if type(layer).__name__ == "QuantLinear":
            weights[f"{name}.weight"] = layer(torch.eye(layer.cols)).T.float().contiguous()
save_file(weights, job["target"] + "/weights.safetensors")
tell(**used, size_bytes=size, layers=len(weights))
