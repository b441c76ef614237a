"""What `lilliput plan` prints: a table of stages with time and memory, and whether the results fit the devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.engine import forecast
from flows.engine.plan import PlannedStage
from lilliput.machine import this_machine

MIB, GIB = 2**20, 2**30
_MINUTE_S = 60.0


@dataclass(frozen=True)
class DeviceFit:
    """Whether a compiled candidate is expected to fit a device.

    Attributes:
        name: under `compile`.
        size_mib: of its files.
        ram_mib: with KV cache and runtime.
    """

    device: str
    name: str
    size_mib: float
    ram_mib: float
    fits: bool


def device_fits(model: forecast.Model | None) -> list[DeviceFit]:
    """Returns an estimate for each device with a champion and each form that it runs; none for an unknown model."""
    if model is None:
        return []
    found = []
    for device in model.params.promotion:
        config = model.params.devices[device]
        for name, form in model.params.compile.items():
            if form.target == config.target:
                size = forecast.compiled_bytes(form, model) / MIB
                ram = forecast.device_bytes(form, device, model) / MIB
                fits = size <= config.storage_budget_mib and ram <= config.ram_budget_mib
                found.append(DeviceFit(device, name, round(size, 1), round(ram, 1), fits))
    return found


def plan_record(planned: Sequence[PlannedStage], fits: Sequence[DeviceFit], data: str | None) -> dict[str, Any]:
    """Returns the plan for programs."""
    machine = this_machine()
    return {
        "stages": [_stage_record(item) for item in planned],
        "seconds": round(total_seconds(planned), 1),
        "devices": [asdict(fit) for fit in fits],
        "data": data,
        "machine": {"memory_bytes": machine.host_bytes, "gpu_bytes": machine.gpu_bytes},
    }


def total_seconds(planned: Sequence[PlannedStage]) -> float:
    """Returns the predicted time of the stages that would run."""
    return sum(item.prediction.seconds for item in planned if item.reason and item.prediction)


def print_plan(
    planned: Sequence[PlannedStage], fits: Sequence[DeviceFit] = (), data: str | None = None, as_json: bool = False
) -> None:
    """Prints which stages would run, with predicted cost, and which candidates are expected to fit their devices."""
    if as_json:
        return print(json.dumps(plan_record(planned, fits, data), indent=2, ensure_ascii=False))
    if data:
        print(data)
    due = [item for item in planned if item.reason]
    console = Console() if Console().is_terminal else Console(width=80)
    if due:
        console.print(_table(due))
    print(f"{len(planned) - len(due)} of {len(planned)} stages are up to date.", _totals(due), sep="\n")
    for line in _fit_lines(fits):
        print(line)
    machine = this_machine()
    gpu = f"a GPU with {machine.gpu_bytes / GIB:.1f} GiB" if machine.gpu_bytes else "no GPU"
    print(f"This machine: {machine.host_bytes / GIB:.1f} GiB, {gpu}. Nothing has been run.")


def _stage_record(item: PlannedStage) -> dict[str, Any]:
    cost = item.prediction
    return {
        "stage": item.stage.name,
        "reason": item.reason,
        "seconds": round(cost.seconds, 1) if cost else None,
        "peak_mib": round(peak / MIB) if (peak := _peak(item)) else None,
        "estimated": cost.is_estimate if cost else None,
        "source": cost.source if cost else None,
    }


def _table(due: Sequence[PlannedStage]) -> Table:
    table = Table(title="Plan", title_justify="left", box=None, pad_edge=False)
    for column, justify in (("stage", "left"), ("why", "left"), ("time", "right"), ("MiB", "right")):
        table.add_column(column, overflow="fold", justify=justify)  # pyright: ignore[reportArgumentType]
    for item in due:
        cost, peak = item.prediction, _peak(item)
        mark = "~" if cost and cost.is_estimate else ""
        memory = f"{'~' if not _is_measured(item) else ''}{peak / MIB:.0f}" if peak else "?"
        table.add_row(item.stage.name, item.reason, f"{mark}{_duration(cost.seconds)}" if cost else "?", memory)
    return table


def _peak(item: PlannedStage) -> int:
    """Returns the measured peak memory, otherwise the estimate; 0 if there is none."""
    measured = item.prediction.peak_rss_bytes if item.prediction else 0
    return measured if _is_measured(item) or not item.memory else item.memory.process_bytes


def _is_measured(item: PlannedStage) -> bool:
    return item.prediction is not None and not item.prediction.is_estimate


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 2 * _MINUTE_S else f"{seconds / _MINUTE_S:.0f} min"


def _totals(due: Sequence[PlannedStage]) -> str:
    if not due:
        return "Nothing would run."
    known = [item.prediction for item in due if item.prediction]
    estimated = sum(prediction.is_estimate for prediction in known)
    unknown = len(due) - len(known)
    rest = f"; {unknown} stage{'s' * (unknown > 1)} of unknown time" if unknown else ""
    peak = max(map(_peak, due)) / MIB
    total = _duration(total_seconds(due))
    note = (
        f"~ estimated from the model's shape ({estimated} stages), perhaps wrong by a factor of two;\n"
        "other figures were measured in earlier runs (docs/memory.md)."
        if estimated
        else "Predictions are records of earlier runs, perhaps of another machine."
    )
    return f"{len(due)} stages would run: about {total}, {peak:,.0f} MiB at the peak{rest}.\n{note}"


def _fit_lines(fits: Sequence[DeviceFit]) -> list[str]:
    lines = []
    for device in dict.fromkeys(fit.device for fit in fits):
        of_device = [fit for fit in fits if fit.device == device]
        fitting = [f"{fit.name} (~{fit.size_mib:.0f} MiB)" for fit in of_device if fit.fits]
        if fitting:
            lines.append(f"{device}: {', '.join(fitting)} should fit")
        else:
            sizes = [f"{fit.name} (~{fit.size_mib:.0f} MiB, ~{fit.ram_mib:.0f} in use)" for fit in of_device]
            lines.append(f"{device}: warning: nothing is expected to fit: {', '.join(sizes)}")
    return lines
