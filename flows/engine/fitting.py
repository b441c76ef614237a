"""Chooses the recipe, the steps and the questions whose predicted time fits a limit, and whose result fits a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flows.engine import forecast
from flows.engine.plan_output import DeviceFit, device_fits
from lilliput.config import DataConfig, DistillConfig, EvaluationConfig, LoraConfig
from lilliput.errors import ConfigError
from lilliput.machine import this_machine
from lilliput.memory import Shape
from lilliput.params import params_of

SHIPPED = "pocket-gguf"  # what a recipe compiles for a phone
_CHAT_TOKENS = 64  # of an answer in a conversation; questions have the default
_LAYERS, _PRUNED = 30, 4  # of the built-in model: prunes deeper models by the same share
_FIXED_STAGES = ("source", "data", "register", "promote", "bundle", "report")
_MIB, _GIB, _MINUTE_S = 2**20, 2**30, 60.0
# From the best to the fastest: a recipe, and the share of its steps and questions.
OPTIONS = (("pocket", 1.0), ("pocket", 0.5), ("quick", 1.0), ("quick", 0.5), ("quick", 0.25))


@dataclass(frozen=True)
class Task:
    """What is asked for.

    Attributes:
        source: the section `source`; None for the built-in model.
        data: `data.source`.
        conversations: whether the rows are conversations instead of questions.
        device: name.
        shape: of the source; None if it is unknown.
    """

    source: dict[str, Any] | None
    data: str
    conversations: bool
    device: str
    shape: Shape | None


@dataclass(frozen=True)
class Choice:
    """Short settings, and what is expected of them.

    Attributes:
        seconds: predicted time; 0 if the shape is unknown.
        peak_bytes: predicted memory of the largest stage, likewise.
        shipped: the expected size on the device; None if the shape is unknown.
    """

    recipe: str
    share: float
    settings: dict[str, Any]
    seconds: float = 0.0
    peak_bytes: int = 0
    shipped: DeviceFit | None = None


def choose(task: Task, minutes: float, file: str) -> Choice:
    """Returns the best option whose predicted time is within `minutes`.

    Without a known shape nothing is predicted, and the first option is returned.

    Raises:
        ConfigError: none fits the time, the memory of this machine or the device; says by how much. `file` is named in
            messages about settings.
    """
    choices = list(_choices(task, file))
    if task.shape is None:
        return choices[0]
    _require_device(task, choices[0])
    possible = _within_memory(choices)
    if in_time := [choice for choice in possible if choice.seconds <= minutes * _MINUTE_S]:
        return in_time[0]
    fastest = min(possible, key=lambda choice: choice.seconds)
    raise ConfigError(
        f"--minutes {minutes:g}: the fastest recipe (`{fastest.recipe}`, {fastest.share:.0%} of the steps) would take "
        f"about {fastest.seconds / _MINUTE_S:.0f} minutes on this machine (an estimate); allow "
        f"--minutes {fastest.seconds / _MINUTE_S + 1:.0f}, or start from a smaller model"
    )


def predicted_seconds(model: forecast.Model) -> float:
    """Returns the estimated time of a whole run."""
    params = model.params
    stages = [(kind, kind) for kind in _FIXED_STAGES]
    stages += [(kind, name) for name in params.candidates for kind in ("compress", "evaluate")]
    stages += [(kind, name) for name in params.compile for kind in ("compile", "devices")]
    stages += [(kind, name) for name in params.serving for kind in ("offload", "log")]
    return sum(forecast.seconds(kind, name, model) for kind, name in stages)


def _choices(task: Task, file: str) -> Iterator[Choice]:
    for recipe, share in OPTIONS:
        settings = short_settings(task, recipe, share)
        params = params_of(settings, file)
        if task.shape is None:
            yield Choice(recipe, share, settings)
            continue
        model = forecast.Model(params, task.shape, forecast.usable_cores())
        shipped = next(fit for fit in device_fits(model) if (fit.device, fit.name) == (task.device, SHIPPED))
        peak = max(forecast.peak_bytes("compress", name, model) or 0 for name in params.candidates)
        yield Choice(recipe, share, settings, predicted_seconds(model), peak, shipped)


def short_settings(task: Task, recipe: str, share: float) -> dict[str, Any]:
    """Returns the settings of an option; all that they leave out is default."""
    settings: dict[str, Any] = {"source": task.source} if task.source else {}
    settings |= {"data": {"source": task.data}, "recipe": recipe, "device": task.device}
    evaluation: dict[str, Any] = {}
    if task.conversations:
        settings["data"]["system_prompt"] = ""  # the default one is about facts
        evaluation["max_new_tokens"] = _CHAT_TOKENS
    strategies: dict[str, Any] = {}
    if share < 1.0:
        strategies["lora"] = {"steps": round(LoraConfig().steps * share)}
        if recipe == "pocket":
            strategies["distill"] = {"steps": round(DistillConfig().steps * share)}
        settings["data"]["choice_questions"] = round(DataConfig().choice_questions * share)
        evaluation["free_questions"] = round(EvaluationConfig().free_questions * share)
    if recipe == "pocket" and task.shape and (removed := _removed_layers(task.shape)) != _PRUNED:
        strategies["prune"] = {"amount": {"by": "removed_count", "value": removed}}
    settings |= {"strategies": strategies} if strategies else {}
    return settings | ({"evaluation": evaluation} if evaluation else {})


def _removed_layers(shape: Shape) -> int:
    return max(1, round(shape.layers * _PRUNED / _LAYERS))


def _require_device(task: Task, smallest: Choice) -> None:
    """Rejects a device that no option fits; `smallest` is pruned, the others have a few layers more."""
    fit = smallest.shipped
    if fit is None or fit.fits:
        return
    raise ConfigError(
        f"--device {task.device}: the result would have about {fit.size_mib:.0f} MiB of files and take "
        f"{fit.ram_mib:.0f} MiB of memory (an estimate), more than this device allows an app; choose a larger device "
        "or a smaller model"
    )


def _within_memory(choices: list[Choice]) -> list[Choice]:
    """Returns the choices that fit the memory of this machine and the device.

    Raises:
        ConfigError: there are none.
    """
    have = this_machine().host_bytes
    if possible := [c for c in choices if c.peak_bytes <= have and c.shipped and c.shipped.fits]:
        return possible
    need = min(choice.peak_bytes for choice in choices)
    raise ConfigError(
        f"about {need / _GIB:.1f} GiB of memory are needed (an estimate), and this machine has {have / _GIB:.1f}; "
        "start from a smaller model, or use a larger machine"
    )
