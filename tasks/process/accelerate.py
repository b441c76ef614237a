"""Several processes for one training, started by accelerate's own launcher: one a GPU, as a rule.

How many there are and what they share is the machine's affair, not the project's: LILLIPUT_ACCELERATE names the file
that `accelerate config` writes. It is no parameter of a stage, so that a result is not made again on another machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, PositiveInt, ValidationError

from lilliput.config import ExpertsConfig, Params, TrainingConfig
from lilliput.errors import ConfigError, StageError
from lilliput.redaction import environment_without_secrets
from tasks import layout
from tasks.process.console import last_error

SETTING = "LILLIPUT_ACCELERATE"


def launcher(params: Params, candidate: str) -> list[str] | None:
    """The command that makes `candidate` in several processes; None where one is to do it: no training, no setting.

    Raises:
        ConfigError: the setting names no file of `accelerate config`, or one that shares out a model for `experts`.
    """
    place, config = os.environ.get(SETTING), params.strategy_config(candidate)
    if not place or "WORLD_SIZE" in os.environ or not isinstance(config, TrainingConfig):
        return None
    settings = _settings(Path(place))
    kind, count = settings.distributed_type, settings.num_processes
    if count == 1:
        return None
    if kind == "FSDP" and isinstance(config, ExpertsConfig):
        raise ConfigError(f"candidates.{candidate}: experts trains whole models; use a {SETTING} without FSDP")
    if config.batch_size % count:
        raise ConfigError(
            f"candidates.{candidate}: batch_size {config.batch_size} cannot be shared out evenly among the {count} "
            f"processes of {place}; change one of them"
        )
    # Told nothing, accelerate 1.15 starts one process on CPU, whatever its file says.
    several = ["--multi_gpu"] if kind == "MULTI_CPU" else []
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", place, "--main_process_port", "0"]
    return [*command, *several, "--module", "tasks.compress", candidate]


def launch(command: list[str], candidate: str) -> None:
    """Runs `command` to its end; what its processes print goes where this one's output goes.

    Raises:
        StageError: it failed; the message is that of its main process.
    """
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if "--multi_gpu" in command else {}
    code = subprocess.run(command, env=environment_without_secrets() | on_cpu, check=False).returncode
    if code:
        log = layout.log(f"compress@{candidate}")
        told = (last_error(log) or "").partition("\n\n")[0]  # the launcher's own traceback follows
        raise StageError(told or f"the processes of accelerate ended with exit code {code}; see {log}")


def shared_among() -> tuple[int, bool]:
    """How many processes a training is shared out among, and whether the model is too."""
    place = os.environ.get(SETTING)
    if not place:
        return 1, False
    settings = _settings(Path(place))
    return settings.num_processes, settings.distributed_type == "FSDP"


def is_main() -> bool:
    """Whether this process writes: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


class _Settings(BaseModel):
    """What is read of the file of `accelerate config`; the rest is accelerate's own affair."""

    distributed_type: Literal["NO", "MULTI_CPU", "MULTI_GPU", "FSDP"]
    num_processes: PositiveInt


def _settings(place: Path) -> _Settings:
    try:
        return _Settings.model_validate(yaml.safe_load(place.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(
            f"{SETTING}: {place}: no file of `accelerate config` for NO, MULTI_CPU, MULTI_GPU or FSDP "
            f"({type(error).__name__}); write one with `accelerate config --config_file {place}`, or unset it to train "
            "in one process"
        ) from error
