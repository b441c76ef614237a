"""A real Android phone over adb: llama.cpp's own bench on it, and what it took from the battery.

python -m lilliput.android bundles/phone-4gb/model.gguf --bench ~/llama-android/llama-bench

The bench binary is yours to build or fetch (llama.cpp, `cmake` with the NDK's toolchain). The phone must not be on its
charger, nor powered by the USB cable, for the battery to tell anything: connect adb over Wi-Fi (`adb pair`).
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
        charge_uah: µAh left, by the fuel gauge's counter; None where the phone has none (it then says 0).
        voltage_v: volts.
        level: percent.
        powered: whether anything charges it.
    """

    charge_uah: int | None
    voltage_v: float
    level: int
    powered: bool


def parse_battery(text: str) -> Battery:
    """What `dumpsys battery` printed.

    Raises:
        ArtifactError: level or voltage are missing.
    """
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(text):
        fields.setdefault(name.strip(), value)  # makers append lines of their own, some under the same names
    if "level" not in fields or "voltage" not in fields:
        raise ArtifactError(f"no battery level or voltage in what the phone says: {text.strip()[:200]!r}")
    voltage = int(fields["voltage"])
    return Battery(
        charge_uah=int(fields.get("Charge counter", "0")) or None,
        voltage_v=voltage / 1000.0 if voltage > 100 else float(voltage),  # millivolts; volts on a few
        level=int(fields["level"]),
        powered=any(fields.get(f"{source} powered") == "true" for source in ("AC", "USB", "Wireless", "Dock")),
    )


def parse_bench(text: str) -> dict[str, Any]:
    """What `llama-bench -o json` printed: tokens per second of prompt and answer, each with its samples.

    Raises:
        ArtifactError: it is no JSON of that form.
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
        raise ArtifactError(f"not what `llama-bench -o json` prints: {text.strip()[:200]!r}") from None


def energy_j(before: Battery, after: Battery) -> float | None:
    """Joules that left the battery: the counter's difference at the mean voltage; None where it tells nothing."""
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
    """Pushes model and bench, runs it, and reads the battery before, after an idle while, and after the run.

    The energy is that of the run less what the phone takes idle in the same time; `idle_watts` is None where idling did
    not move the counter, and then nothing is taken off. It is of the whole phone, so switch the screen off; a counter
    moves in steps of a milliampere-hour or so, hence the repetitions.

    Args:
        model: a GGUF file.
        bench: llama.cpp's `llama-bench` for the phone.
        serial: which phone, as `adb devices` names it.
        threads: CPU threads there.
        prompt_tokens: of each prompt.
        new_tokens: of each answer.
        repetitions: of both.
        idle_s: how long idle power is watched before.
        deadline_s: after which the run is given up.

    Raises:
        ArtifactError: adb is missing or fails, the run takes too long, or its output is not understood.
    """
    adb = _Adb(serial, deadline_s)
    adb.run("shell", "mkdir", "-p", FOLDER)
    adb.run("push", str(model), f"{FOLDER}/model.gguf")
    adb.run("push", str(bench), f"{FOLDER}/llama-bench")
    adb.run("shell", "chmod", "755", f"{FOLDER}/llama-bench")
    idle_from = parse_battery(adb.run("shell", "dumpsys", "battery"))
    time.sleep(idle_s)
    before = parse_battery(adb.run("shell", "dumpsys", "battery"))
    sizes = ["-p", str(prompt_tokens), "-n", str(new_tokens), "-r", str(repetitions), "-t", str(threads)]
    started = time.monotonic()
    told = adb.run("shell", f"cd {FOLDER} && LD_LIBRARY_PATH=. ./llama-bench -m model.gguf {' '.join(sizes)} -o json")
    took_s = time.monotonic() - started
    after = parse_battery(adb.run("shell", "dumpsys", "battery"))
    found = parse_bench(told)
    used, idle = energy_j(before, after), energy_j(idle_from, before)
    idle_w = idle / idle_s if idle is not None and idle_s else None  # None: not taken off, the counter told nothing
    per_token = None if used is None else max(0.0, used - (idle_w or 0.0) * took_s) / found["tokens"]
    return found | {
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
            done = subprocess.run(
                [*self._command, *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=self._deadline_s,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise ArtifactError(f"adb {' '.join(arguments)}: not done after {self._deadline_s:g} s") from None
        if done.returncode:
            raise ArtifactError(f"adb {' '.join(arguments)}: {(done.stderr or done.stdout).strip()[:500]}")
        return done.stdout


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
        found = bench_on_phone(
            model, bench, serial=serial, threads=threads, repetitions=repetitions, idle_s=idle_seconds
        )
    except ArtifactError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    app()
