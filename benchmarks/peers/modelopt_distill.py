"""ModelOpt's KDTrainer on the answers alone: `modelopt_distill.py <job.json>`, in its environment."""

import json
import sys
from pathlib import Path

import torch
from clock import StepClock
from modelopt.torch.distill.plugins.huggingface import KDTrainer
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM, TrainingArguments
from usage import so_far, tell

job = json.loads(Path(sys.argv[1]).read_text())
student, teacher = (AutoModelForCausalLM.from_pretrained(job[key], dtype=torch.float32) for key in ("model", "teacher"))


def collate(rows):
    """Right-padded; what is padding is not attended to and not learnt."""
    longest = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])
        for key, fill in fills.items()
    }


clock = StepClock()
trainer = KDTrainer(
    model=student,
    train_dataset=job["examples"],
    data_collator=collate,
    distill_args={"teacher_model": teacher, "temperature": job["temperature"]},
    args=TrainingArguments(
        output_dir=job["target"] + "/modelopt",
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch_size"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=job["warmup_steps"],
        max_grad_norm=job["max_grad_norm"],
        seed=job["seed"],
        data_seed=job["seed"],
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    ),
    callbacks=[clock],
)
trainer.train()
used = so_far()
save_model(student, job["target"] + "/weights.safetensors")
tell(**used, step_seconds=clock.seconds, step_cpu_seconds=clock.cpu_seconds)
