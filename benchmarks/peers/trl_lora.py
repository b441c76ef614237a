"""trl's SFTTrainer with LoRA on the answers alone: `trl_lora.py <job.json>`, in trl's environment."""

import json
import sys
from pathlib import Path

import torch
from clock import StepClock
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from usage import so_far, tell

job = json.loads(Path(sys.argv[1]).read_text())
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
torch.manual_seed(job["seed"])
model = get_peft_model(
    model, LoraConfig(r=job["rank"], lora_alpha=job["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
)
rows = [
    {"input_ids": row["input_ids"], "completion_mask": [int(label >= 0) for label in row["labels"]]}
    for row in job["examples"]
]
clock = StepClock()
trainer = SFTTrainer(
    model=model,
    processing_class=AutoTokenizer.from_pretrained(job["model"]),
    train_dataset=Dataset.from_list(rows),
    args=SFTConfig(
        output_dir=job["target"],
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch_size"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=job["warmup_steps"],
        max_grad_norm=job["max_grad_norm"],
        seed=job["seed"],
        data_seed=job["seed"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        completion_only_loss=True,
        bf16=False,
        gradient_checkpointing=False,  # its default saves memory and costs a third more time
        dataloader_pin_memory=False,
    ),
    callbacks=[clock],
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
tell(**so_far(), step_seconds=clock.seconds, step_cpu_seconds=clock.cpu_seconds, losses=losses)
