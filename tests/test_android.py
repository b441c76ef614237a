import os
import sys
from pathlib import Path

import pytest

from lilliput.android import Battery, bench_on_phone, energy_j, parse_battery, parse_bench
from lilliput.errors import ArtifactError

RECORDED = Path(__file__).parent / "recorded"
# A fake phone: it replays recorded output, and its battery loses 20 mAh with each reading.
ADB = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
log = pathlib.Path({log!r})
with log.open("a") as stream:
    print(" ".join(arguments), file=stream)
text = pathlib.Path({recorded!r}, "dumpsys-battery-galaxy.txt").read_text()
if "dumpsys" in arguments:
    readings = log.read_text().count("dumpsys")
    text = text.replace("USB powered: true", "USB powered: {powered}")
    print(text.replace("Charge counter: 0", f"Charge counter: {{3_000_000 - 20_000 * readings}}"))
elif "llama-bench -m" in " ".join(arguments):
    if {broken!r}:
        print("error: unable to load model", file=sys.stderr)
        sys.exit(1)
    print(pathlib.Path({recorded!r}, "llama-bench.json").read_text())
elif "getprop" in arguments:
    print("SM-G960N")
"""


@pytest.fixture
def phone(tmp_path, monkeypatch):
    def make(powered="false", broken=False):
        adb, log = tmp_path / "adb", tmp_path / "log"
        adb.write_text(
            ADB.format(python=sys.executable, log=str(log), recorded=str(RECORDED), powered=powered, broken=broken)
        )
        adb.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return log

    return make


def run(**settings):
    return bench_on_phone(Path("model.gguf"), Path("llama-bench"), idle_s=0.0, **settings)


def test_a_recorded_battery_is_parsed():
    battery = parse_battery((RECORDED / "dumpsys-battery-galaxy.txt").read_text())
    assert battery == Battery(charge_uah=None, voltage_v=4.063, level=84, powered=True)


def test_a_recorded_bench_is_parsed():
    record = parse_bench("some notice\n" + (RECORDED / "llama-bench.json").read_text())
    assert record["prefill_tokens_per_s"]["value"] == 7100.002165
    assert record["decode_tokens_per_s"]["samples"] == [119.03, 120.178, 119.43, 118.307, 117.464]
    assert record["tokens"] == 5 * (512 + 128)
    assert record["seconds"] == pytest.approx(5.7446, abs=1e-3)


@pytest.mark.parametrize("text", ["", "{}", "[]", '[{"n_prompt": 1}]', "Segmentation fault"])
def test_other_output_than_a_bench_is_an_error(text):
    with pytest.raises(ArtifactError, match="llama-bench -o json"):
        parse_bench(text)


def test_energy_is_charge_times_voltage():
    before, after = (Battery(charge, 4.0, 80, powered=False) for charge in (3_000_000, 2_990_000))
    assert energy_j(before, after) == pytest.approx(0.01 * 3600 * 4.0)  # 10 mAh at 4 V
    assert energy_j(after, before) is None  # the battery was charged
    assert energy_j(before, Battery(2_990_000, 4.0, 80, powered=True)) is None
    assert energy_j(before, Battery(None, 4.0, 80, powered=False)) is None


def test_the_pushed_files_are_benchmarked(phone):
    log = phone()
    record = run(serial="ABC", threads=2, repetitions=5)
    commands = log.read_text().splitlines()
    assert all(line.startswith("-s ABC ") for line in commands)
    assert commands[1] == "-s ABC push model.gguf /data/local/tmp/lilliput/model.gguf"
    assert "-p 128 -n 64 -r 5 -t 2 -o json" in "\n".join(commands)
    assert record["model"] == "SM-G960N"
    # 20 mAh at 4.063 V for the recorded run's 3,200 tokens; with no idle time nothing is subtracted.
    energy = record["energy_per_token_j"]
    assert energy["value"] == pytest.approx(0.02 * 3600 * 4.063 / 3200)
    assert (energy["source"], energy["measured"]) == ("battery", True)


def test_a_powered_phone_has_no_energy_figure(phone):
    phone(powered="true")
    energy = run()["energy_per_token_j"]
    assert energy == {"value": None, "source": "unavailable", "measured": False, "idle_watts": None}


def test_a_failure_on_the_phone_is_an_error(phone):
    phone(broken=True)
    with pytest.raises(ArtifactError, match="unable to load model"):
        run()


def test_a_missing_adb_is_an_error_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArtifactError, match="platform tools"):
        run()
