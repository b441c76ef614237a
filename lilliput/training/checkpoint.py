"""The state from which a killed training goes on: trainable weights, optimiser, schedule and random numbers.

transformers' Trainer would write it with torch.save, which is pickle; here it is safetensors and JSON.
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
from lilliput.artifacts import file_sha256, library_versions, written_aside

_WEIGHTS, _OPTIMIZER, _SCHEDULE, _RANDOM = (
    "weights.safetensors",
    "optimizer.safetensors",
    "schedule.json",
    "random.safetensors",
)
_CODE = ("compress", "training", "chat", "data")  # what examples, losses and steps follow from


def fingerprint(*parts: Any) -> str:
    """The sha256 of `parts` (JSON values) and of what else a training follows from: code, libraries, kind of device.

    What is kept under it is never used for other work, and nothing has to be told to make it stale.
    """
    package = Path(__file__).parents[1]
    code = [path for folder in _CODE for path in sorted((package / folder).glob("*.py"))]
    sums = [file_sha256(path) for path in [*code, package / "models.py"]]
    whole = [parts, sums, library_versions(), lilliput.models.device().type]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`, `checkpoint-<step>`; None if there is none."""
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return Path(found) if found else None


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Writes `model`'s trainable weights to `path`, whole or not at all."""
    with written_aside(path) as partial:
        save_file({name: weight.detach().contiguous() for name, weight in _trainable(model).items()}, partial)


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Gives `model` the weights that `save_weights` wrote, in place."""
    stored = load_file(path)
    with torch.no_grad():
        for name, weight in _trainable(model).items():
            weight.copy_(stored[name])


def save_state(model: torch.nn.Module, optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Writes all that the next step follows from into `folder`, but for the place in the data."""
    save_weights(model, folder / _WEIGHTS)
    state = optimizer.state_dict()
    moments = {f"{number}.{key}": value for number, row in state["state"].items() for key, value in row.items()}
    save_file(moments, folder / _OPTIMIZER)
    schedule = {"param_groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    (folder / _SCHEDULE).write_text(json.dumps(schedule), encoding="utf-8")
    save_file(_random_state(), folder / _RANDOM)


def load_checkpoint_weights(model: torch.nn.Module, folder: Path) -> None:
    """Gives `model` the weights in the checkpoint `folder`, in place."""
    load_weights(model, folder / _WEIGHTS)


def load_optimizer(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Puts the optimiser and the learning rate's schedule where the checkpoint `folder` has them."""
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(folder / _OPTIMIZER).items():
        number, _, key = name.partition(".")
        moments.setdefault(int(number), {})[key] = value
    schedule = json.loads((folder / _SCHEDULE).read_text(encoding="utf-8"))
    optimizer.load_state_dict({"state": moments, "param_groups": schedule["param_groups"]})
    scheduler.load_state_dict(schedule["scheduler"])


def load_random(folder: Path) -> None:
    """Lets torch draw on from where the checkpoint `folder` was written."""
    state = load_file(folder / _RANDOM)
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.random.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
