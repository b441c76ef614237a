"""Measures a compiled model on a real Android phone over adb: llama.cpp's bench, and the energy from the battery.

python -m lilliput.android bundles/phone-4gb/model.gguf --bench ~/llama-android/llama-bench

Build or download the bench binary yourself (llama.cpp, `cmake` with the NDK's toolchain). The battery shows energy only
if the phone is neither on its charger nor powered by the USB cable: connect adb over Wi-Fi (`adb pair`).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lilliput.errors import ArtifactError

FOLDER = "/data/local/tmp/lilliput"
_FIELD = re.compile(r"^\s*([A-Za-z ]+): (\S+)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Battery:
    """One reading of Android's battery service.

    Attributes:
        charge_uah: remaining charge in µAh by the fuel gauge's counter; None if the phone has none (it reports 0).
        voltage_v: volts.
        level: percent.
        powered: whether the phone is charging.
    """

    charge_uah: int | None
    voltage_v: float
    level: int
    powered: bool


def parse_battery(text: str) -> Battery:
    """Parses the output of `dumpsys battery`.

    Raises:
        ArtifactError: level or voltage is missing.
    """
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(text):
        fields.setdefault(name.strip(), value)  # manufacturers append own lines, some with the same names
    if "level" not in fields or "voltage" not in fields:
        raise ArtifactError(f"no battery level or voltage in the phone's output: {text.strip()[:200]!r}")
    voltage = int(fields["voltage"])
    return Battery(
        charge_uah=int(fields.get("Charge counter", "0")) or None,
        voltage_v=voltage / 1000.0 if voltage > 100 else float(voltage),  # millivolts; volts on a few
        level=int(fields["level"]),
        powered=any(fields.get(f"{source} powered") == "true" for source in ("AC", "USB", "Wireless", "Dock")),
    )


def parse_bench(text: str) -> dict[str, Any]:
    """Parses the output of `llama-bench -o json`: tokens per second of prompt and answer, with their samples.

    Raises:
        ArtifactError: the output has another form.
    """
    try:
        rows = json.loads(text[text.index("[") :])
        prefill = next(row for row in rows if row["n_prompt"] and not row["n_gen"])
        decode = next(row for row in rows if row["n_gen"] and not row["n_prompt"])
        return {
            "prefill_tokens_per_s": {"value": prefill["avg_ts"], "samples": prefill["samples_ts"]},
            "decode_tokens_per_s": {"value": decode["avg_ts"], "samples": decode["samples_ts"]},
            "tokens": sum(row["n_prompt"] + row["n_gen"] for row in rows) * len(prefill["samples_ts"]),
            "seconds": sum(sum(row["samples_ns"]) for row in rows) / 1e9,
            "processor": prefill["cpu_info"].strip(),
            "build": prefill["build_commit"],
            "threads": prefill["n_threads"],
        }
    except (ValueError, KeyError, TypeError, StopIteration):
        raise ArtifactError(f"not the output of `llama-bench -o json`: {text.strip()[:200]!r}") from None


def energy_j(before: Battery, after: Battery) -> float | None:
    """Returns the joules taken from the battery: charge difference × mean voltage; None if the counter shows none."""
    if before.powered or after.powered or before.charge_uah is None or after.charge_uah is None:
        return None
    used_uah = before.charge_uah - after.charge_uah
    return used_uah * 1e-6 * 3600.0 * (before.voltage_v + after.voltage_v) / 2 if used_uah > 0 else None


def bench_on_phone(
    model: Path,
    bench: Path,
    *,
    serial: str | None = None,
    threads: int = 4,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repetitions: int = 20,
    idle_s: float = 60.0,
    deadline_s: float = 1800.0,
) -> dict[str, Any]:
    """Pushes model and bench, runs the bench, and reads the battery before an idle period, after it, and after the run.

    The energy is that of the run minus the phone's idle energy in the same time. `idle_watts` is None if idling did not
    change the counter; then nothing is subtracted. The energy is of the whole phone, so switch the screen off. The
    counter moves in steps of about a milliampere-hour, hence the repetitions.

    Args:
        model: a GGUF file.
        bench: llama.cpp's `llama-bench` for the phone.
        serial: the phone's serial number in `adb devices`.
        threads: CPU threads on the phone.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens of each answer.
        repetitions: of prompt and answer.
        idle_s: seconds of the idle period before the run.
        deadline_s: limit of each adb command.

    Raises:
        ArtifactError: adb is missing or fails, the run takes too long, or its output cannot be parsed.
    """
    adb = _Adb(serial, deadline_s)
    adb.run("shell", "mkdir", "-p", FOLDER)
    adb.run("push", str(model), f"{FOLDER}/model.gguf")
    adb.run("push", str(bench), f"{FOLDER}/llama-bench")
    adb.run("shell", "chmod", "755", f"{FOLDER}/llama-bench")
    idle_start = parse_battery(adb.run("shell", "dumpsys", "battery"))
    time.sleep(idle_s)
    before = parse_battery(adb.run("shell", "dumpsys", "battery"))
    sizes = ["-p", str(prompt_tokens), "-n", str(new_tokens), "-r", str(repetitions), "-t", str(threads)]
    started = time.monotonic()
    output = adb.run("shell", f"cd {FOLDER} && LD_LIBRARY_PATH=. ./llama-bench -m model.gguf {' '.join(sizes)} -o json")
    duration_s = time.monotonic() - started
    after = parse_battery(adb.run("shell", "dumpsys", "battery"))
    record = parse_bench(output)
    used_j, idle_j = energy_j(before, after), energy_j(idle_start, before)
    idle_w = idle_j / idle_s if idle_j is not None and idle_s else None  # None: nothing is subtracted
    per_token = None if used_j is None else max(0.0, used_j - (idle_w or 0.0) * duration_s) / record["tokens"]
    return record | {
        "model": adb.run("shell", "getprop", "ro.product.model").strip(),
        "energy_per_token_j": {
            "value": per_token,
            "source": "battery" if per_token is not None else "unavailable",
            "measured": per_token is not None,
            "idle_watts": idle_w,
        },
        "battery_level": [before.level, after.level],
    }


class _Adb:
    def __init__(self, serial: str | None, deadline_s: float) -> None:
        program = shutil.which("adb")
        if program is None:
            raise ArtifactError("adb is not on the PATH; install Android's platform tools")
        self._command = [program, *(["-s", serial] if serial else [])]
        self._deadline_s = deadline_s

    def run(self, *arguments: str) -> str:
        try:
            process = subprocess.run(
                [*self._command, *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=self._deadline_s,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise ArtifactError(f"adb {' '.join(arguments)}: did not finish within {self._deadline_s:g} s") from None
        if process.returncode:
            raise ArtifactError(f"adb {' '.join(arguments)}: {(process.stderr or process.stdout).strip()[:500]}")
        return process.stdout


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a GGUF file")],
    bench: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="llama.cpp's llama-bench for the phone")],
    serial: Annotated[str | None, typer.Option(help="which phone, as `adb devices` names it")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads on the phone")] = 4,
    repetitions: Annotated[
        int, typer.Option(help="of prompt and answer; more make the battery's figure steadier")
    ] = 20,
    idle_seconds: Annotated[float, typer.Option(help="how long idle power is watched before")] = 60.0,
) -> None:
    """Run a compiled model on a phone and print tokens per second and joules per token as JSON."""
    try:
        record = bench_on_phone(
            model, bench, serial=serial, threads=threads, repetitions=repetitions, idle_s=idle_seconds
        )
    except ArtifactError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(json.dumps(record, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    app()
