"""Trains one candidate in several processes, usually one per GPU, started by the launcher of accelerate.

The number of processes depends on the machine, not on the project: LILLIPUT_ACCELERATE names the file that
`accelerate config` writes. It is not a parameter of a stage, so another machine does not invalidate results.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, PositiveInt, ValidationError

from lilliput.config import ExpertsConfig, Params, TrainingConfig
from lilliput.errors import ConfigError, StageError
from lilliput.redaction import environment_without_secrets
from tasks import layout
from tasks.process.console import last_error

SETTING = "LILLIPUT_ACCELERATE"


def launch_command(params: Params, candidate: str) -> list[str] | None:
    """Returns the command that trains `candidate` in several processes.

    None if one process suffices: the strategy trains nothing, or the environment variable is not set.

    Raises:
        ConfigError: the file is missing or invalid, shards the model of `experts`, or does not divide the batch size.
    """
    path, config = os.environ.get(SETTING), params.strategy_config(candidate)
    if not path or "WORLD_SIZE" in os.environ or not isinstance(config, TrainingConfig):
        return None
    settings = _settings(Path(path))
    kind, count = settings.distributed_type, settings.num_processes
    if count == 1:
        return None
    if kind == "FSDP" and isinstance(config, ExpertsConfig):
        raise ConfigError(f"candidates.{candidate}: experts trains whole models; use a {SETTING} without FSDP")
    if config.batch_size % count:
        raise ConfigError(
            f"candidates.{candidate}: batch_size {config.batch_size} cannot be divided evenly among the {count} "
            f"processes of {path}; change one of them"
        )
    # Without this option accelerate 1.15 ignores num_processes on CPU and starts one process.
    multi_gpu = ["--multi_gpu"] if kind == "MULTI_CPU" else []
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, "--main_process_port", "0"]
    return [*command, *multi_gpu, "--module", "tasks.compress", candidate]


def launch(command: list[str], candidate: str) -> None:
    """Runs `command`; its processes share the output of this one.

    Raises:
        StageError: the command failed; the message is that of its main process.
    """
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if "--multi_gpu" in command else {}
    code = subprocess.run(command, env=environment_without_secrets() | on_cpu, check=False).returncode
    if code:
        log = layout.log(f"compress@{candidate}")
        message = (last_error(log) or "").partition("\n\n")[0]  # the launcher's own traceback follows
        raise StageError(message or f"the processes of accelerate ended with exit code {code}; see {log}")


def training_processes() -> tuple[int, bool]:
    """Returns the number of processes of a training, and whether they shard the model."""
    path = os.environ.get(SETTING)
    if not path:
        return 1, False
    settings = _settings(Path(path))
    return settings.num_processes, settings.distributed_type == "FSDP"


def is_main() -> bool:
    """Whether this process writes results: it is the only one or the first of several."""
    return os.environ.get("RANK", "0") == "0"


class _Settings(BaseModel):
    """The fields of the file of `accelerate config` that are used here."""

    distributed_type: Literal["NO", "MULTI_CPU", "MULTI_GPU", "FSDP"]
    num_processes: PositiveInt


def _settings(path: Path) -> _Settings:
    import yaml  # 18 ms, and most runs have no such file

    try:
        return _Settings.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(
            f"{SETTING}: {path}: not a file of `accelerate config` for NO, MULTI_CPU, MULTI_GPU or FSDP "
            f"({type(error).__name__}); write one with `accelerate config --config_file {path}`, or unset it to train "
            "in one process"
        ) from error
