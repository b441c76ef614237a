"""Training checkpoints: trainable weights, optimiser, schedule and random state, as safetensors and JSON.

transformers' Trainer would write them with torch.save, which uses pickle.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint

import lilliput.models
from lilliput.artifacts import file_sha256, library_versions, writing_file

_WEIGHTS, _OPTIMIZER, _SCHEDULE, _RANDOM = (
    "weights.safetensors",
    "optimizer.safetensors",
    "schedule.json",
    "random.safetensors",
)
_FOLDERS = ("training", "chat", "data")
_STRATEGIES = (
    "lora",
    "distill",
    "experts",
    "mixture",
    "context",
    "result",
    "hooks",
    "new_tokens",
)  # those that train, and their parts
_CODE = (
    *(f"{folder}/*.py" for folder in _FOLDERS),
    *(f"compress/{name}.py" for name in _STRATEGIES),
    "models.py",
    "stored_weights.py",
    "statistics/perplexity.py",
)  # determines examples, losses and steps


def fingerprint(*parts: Any) -> str:
    """Returns the sha256 of `parts` (JSON values) and of the code, the libraries and the kind of device.

    Used as a cache key: a change of any input gives another key.
    """
    package = Path(__file__).parents[1]
    sums = [file_sha256(path) for pattern in _CODE for path in sorted(package.glob(pattern))]
    inputs = [parts, sums, library_versions(), lilliput.models.device().type]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the last complete checkpoint in `folder`, `checkpoint-<step>`, or None."""
    path = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return Path(path) if path else None


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Writes the trainable weights of `model` to `path` atomically."""
    with writing_file(path) as partial:
        save_file({name: weight.detach().contiguous() for name, weight in _trainable(model).items()}, partial)


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Loads the weights that `save_weights` wrote into `model`."""
    stored = load_file(path)
    with torch.no_grad():
        for name, weight in _trainable(model).items():
            weight.copy_(stored[name])


def save_state(model: torch.nn.Module, optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Writes the training state into `folder`, without the position in the data."""
    save_weights(model, folder / _WEIGHTS)
    state = optimizer.state_dict()
    moments = {f"{number}.{key}": value for number, row in state["state"].items() for key, value in row.items()}
    save_file(moments, folder / _OPTIMIZER)
    schedule = {"param_groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    (folder / _SCHEDULE).write_text(json.dumps(schedule), encoding="utf-8")
    save_file(_random_state(), folder / _RANDOM)


def load_checkpoint_weights(model: torch.nn.Module, folder: Path) -> None:
    """Loads the weights of the checkpoint `folder` into `model`."""
    load_weights(model, folder / _WEIGHTS)


def load_optimizer(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Restores the optimiser and the learning-rate schedule from the checkpoint `folder`."""
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(folder / _OPTIMIZER).items():
        number, _, key = name.partition(".")
        moments.setdefault(int(number), {})[key] = value
    schedule = json.loads((folder / _SCHEDULE).read_text(encoding="utf-8"))
    optimizer.load_state_dict({"state": moments, "param_groups": schedule["param_groups"]})
    scheduler.load_state_dict(schedule["scheduler"])


def load_random(folder: Path) -> None:
    """Restores torch's random state from the checkpoint `folder`."""
    state = load_file(folder / _RANDOM)
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.random.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
