"""llm-compressor's GPTQModifier: `llmcompressor_gptq.py <job.json>`, in its environment."""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from usage import folder_bytes, so_far, tell

job = json.loads(Path(sys.argv[1]).read_text())
rows = job["calibration"]
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(job["model"])
weights_of_four_bits = QuantizationArgs(
    num_bits=job["bits"], type="int", symmetric=job["symmetric"], strategy="group", group_size=job["group_size"]
)
scheme = QuantizationScheme(targets=["Linear"], weights=weights_of_four_bits)
oneshot(
    model=model,
    tokenizer=tokenizer,
    dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]),
    recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
    num_calibration_samples=len(rows),
    max_seq_length=max(map(len, rows)),
    shuffle_calibration_samples=False,
)
before_saving = so_far()
kept = {  # for one judge of all; saving packs the weights of the model in memory
    name + ".weight": layer.weight.detach().clone().float()
    for name, layer in model.named_modules()
    if hasattr(layer, "quantization_scheme") and isinstance(layer, torch.nn.Linear)
}
saving = so_far()
target = job["target"] + "/llmcompressor"
model.save_pretrained(target, save_compressed=True)
used = so_far()
for key in ("seconds", "cpu_seconds"):
    used[key] -= saving[key] - before_saving[key]
used["peak_rss_bytes"] = before_saving["peak_rss_bytes"]
save_file(kept, job["target"] + "/weights.safetensors")
tell(**used, size_bytes=folder_bytes(target), layers=len(kept))
