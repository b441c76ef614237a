"""What a run shows meanwhile: lines of at most 80 columns, the remaining time, and a terminal that is left clean."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from flows.engine import display as displays
from flows.engine.display import BarDisplay, LineDisplay, open_display
from flows.engine.plan import predicted_seconds
from flows.engine.progress import WIDTH, Progress, duration, rough
from flows.engine.stage import Stage
from flows.engine.stage_output import reading_output
from lilliput.errors import ConfigError
from tests.flows.conftest import PROJECT

LONG = "a-candidate-whose-name-is-much-longer-than-a-terminal-is-wide-and-then-some-more-of-it"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def stages(**needs):
    return [Stage(f"compress@{name}", "true", f"makes {name}", tuple(needed)) for name, needed in needs.items()]


def begun(clock, every, predicted_s, workers=1):
    progress = Progress(clock)
    progress.begin(every, {f"compress@{name}": seconds for name, seconds in predicted_s.items()}, workers)
    progress.expect([stage.name for stage in every])
    return progress


def test_a_running_stage_has_its_number_time_and_the_rest_of_the_run(clock):
    first, second = stages(a=[], b=["compress@a"])
    progress = begun(clock, [first, second], {"a": 180.0, "b": 600.0})
    progress.start(first)
    clock.now = 130.0
    assert progress.lines() == ["[1/2] a: makes a · 2:10 · ETA 11 min"]
    progress.note_part(first, "quantise 37 %")
    assert progress.lines() == ["[1/2] a: makes a · 2:10 · quantise 37 % · ETA 11 min"]
    assert progress.end(first, failed=False) == "[1/2] a: makes a · 2:10"
    assert 0.15 < progress.share() < 0.2


def test_the_rest_follows_the_speed_of_this_machine(clock):
    first, second = stages(a=[], b=[])
    progress = begun(clock, [first, second], {"a": 540.0, "b": 600.0})
    assert progress.remaining_s() == 1140.0
    progress.start(first)
    clock.now = 1140.0  # twice as slow: (1140 + 60) / (540 + 60)
    progress.end(first, failed=False)
    assert progress.remaining_s() == 1200.0


def test_with_several_workers_the_longest_chain_limits_the_rest(clock):
    every = stages(a=[], b=["compress@a"], c=["compress@b"], d=[])
    predicted_s = {"a": 10.0, "b": 10.0, "c": 10.0, "d": 2.0}
    assert begun(clock, every, predicted_s).remaining_s() == 32.0
    assert begun(clock, every, predicted_s, workers=2).remaining_s() == 30.0


def test_a_stage_without_a_prediction_takes_as_long_as_others(clock):
    every = stages(a=[], b=[], c=[])
    assert begun(clock, every, {"a": 10.0, "b": 30.0}).remaining_s() == 60.0
    progress = begun(clock, every, {})
    assert progress.remaining_s() is None
    assert "ETA" not in progress.start(every[0])


def test_parallel_stages_have_a_line_each_and_the_rest_is_in_the_last(clock):
    first, second = stages(a=[], b=[])
    progress = begun(clock, [first, second], {"a": 10.0, "b": 10.0}, workers=2)
    progress.start(first)
    progress.start(second)
    assert progress.lines() == ["[1/2] a: makes a · 0:00", "[2/2] b: makes b · 0:00 · ETA 10 s"]


def test_stages_that_are_up_to_date_share_one_line(clock):
    every = stages(a=[], b=[], c=[])
    progress = begun(clock, every, {})
    progress.skip(every[0])
    progress.skip(every[1])
    assert progress.skipped_line() == "[1–2/3] up to date: compress@a, compress@b"
    assert progress.skipped_line() == ""
    assert progress.start(every[2]).startswith("[3/3] ")


def test_every_line_fits_80_columns(clock):
    every = [Stage(f"compress@{LONG}", "true", LONG), *stages(**{f"c{number}-{LONG}": [] for number in range(9)})]
    progress = begun(clock, every, dict.fromkeys([LONG], 90000.0))
    for stage in every[1:]:
        progress.skip(stage)
    lines = [progress.skipped_line(), progress.start(every[0])]
    progress.note_part(every[0], "an unusually long label 100 %")
    clock.now = 36_000.0
    lines += [*progress.lines(), progress.end(every[0], failed=True)]
    assert all(20 < len(line) <= WIDTH for line in lines), lines
    assert lines[-1].endswith("· failed after 10:00:00")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (130.9, "2:10"), (3730, "1:02:10")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(1, "10 s"), (44, "40 s"), (58, "1 min"), (7500, "2 h 5 min")])
def test_predicted_times_are_rough(seconds, text):
    assert rough(seconds) == text


def test_predictions_come_from_records_and_a_damaged_one_predicts_nothing(tmp_path):
    shutil.copyfile(PROJECT / "examples" / "tiny.yaml", tmp_path / "params.yaml")
    (tmp_path / "costs").mkdir()
    cost = '{"seconds": 12.5, "cpu_seconds": 9.0, "peak_rss_bytes": 5}'
    (tmp_path / "costs" / "lora.json").write_text(cost)
    predicted = predicted_seconds(["compress@lora", "compress@pocket", "register"], tmp_path)
    assert predicted.pop("compress@pocket") > 0.0  # from the shape of the model
    assert predicted == {"compress@lora": 12.5, "register": 5.0}
    (tmp_path / "costs" / "lora.json").write_text(cost[:9])
    assert predicted_seconds(["compress@lora"], tmp_path) == {}


def test_plain_lines_have_no_control_characters(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    shutil.copyfile(PROJECT / "examples" / "tiny.yaml", tmp_path / "params.yaml")
    first, second = stages(lora=[], pruned=[])
    with open_display(tmp_path) as display:
        assert type(display) is LineDisplay
        display.begin([first, second], workers=1)
        display.skip(first)
        display.start(second)
        display.hear(second, "gradients:  37%|###7      | 3/8 [00:01<00:02, 1.2text/s]")
        display.hear(second, "3 of 40 rows were skipped")
        display.end(second, failed=False)
    shown = capsys.readouterr().err
    assert shown.splitlines() == [
        "[1/2] up to date: compress@lora",
        "[2/2] pruned: makes pruned · ETA 10 s",
        "3 of 40 rows were skipped",
        "[2/2] pruned: makes pruned · 0:00",
    ]
    assert not CONTROL.search(shown)


def test_the_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "logs").write_text("")
    with pytest.raises(ConfigError, match=r"logs/run\.log: the log cannot be written"), open_display(tmp_path):
        pass


@pytest.mark.parametrize("columns", [80, 50])
def test_the_bar_fits_the_terminal(columns):
    screen, stage = io.StringIO(), Stage(f"compress@{LONG}", "true", LONG)
    console = Console(file=screen, force_terminal=True, width=columns, color_system=None, _environ={"TERM": "xterm"})
    with BarDisplay(lambda _names: {}, console) as display:
        display.begin([stage], workers=1)
        display.start(stage)
        shown = screen.getvalue()
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", shown).replace("\r", "\n").splitlines()
    assert any(line.startswith("[1/1] ") for line in plain) and any(line.rstrip().endswith("0%") for line in plain)
    assert max(map(len, plain)) <= columns


RUN = f"""
import sys; sys.path.insert(0, {str(PROJECT)!r})
from pathlib import Path
from flows.engine.launch import launch
from flows.engine.runners import open_runner
from flows.engine.stage import Stage

def work():
    with open_runner("local", 1, Path.cwd(), True) as runner:
        stage = Stage("data", f"{{sys.executable}} stage.py", "waits")
        runner.display.begin([stage], 1)
        runner.display.start(stage)
        runner.start(stage, ["new"])
        runner.wait_for_next()

launch(work, run_name="", stop_message="stopped; all is well")
"""
STAGE = f"""
import sys; sys.path.insert(0, {str(PROJECT)!r})
import signal, time
from lilliput.child import end_with_stdin
from tqdm import tqdm
signal.signal(signal.SIGINT, signal.SIG_IGN)
end_with_stdin()
for _ in tqdm(range(100), desc="wait"):
    time.sleep(1)
"""


def test_ctrl_c_leaves_the_terminal_clean(tmp_path):
    """In a pseudo-terminal: the bar is removed, the cursor is back, and one message remains."""
    shutil.copyfile(PROJECT / "examples" / "tiny.yaml", tmp_path / "params.yaml")
    (tmp_path / "stage.py").write_text(STAGE)
    mine, theirs = pty.openpty()
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    run = subprocess.Popen(
        [sys.executable, "-c", RUN], cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown, sent, deadline = b"", False, time.monotonic() + 120
    while time.monotonic() < deadline:
        if not select.select([mine], [], [], 0.5)[0]:
            continue
        try:
            content = os.read(mine, 65536)
        except OSError:  # the last process has closed the terminal
            break
        if not content:
            break
        shown += content
        if not sent and re.search(rb"waits . \S+ . wait +\d+ %", shown.replace("·".encode(), b".")):
            run.send_signal(signal.SIGINT)
            sent = True
    os.close(mine)
    assert sent, shown
    assert run.wait(60) == 130
    text = shown.decode()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor
    after = text.rpartition("\x1b[2K\r\n")[2]  # the bar is erased last
    assert after.replace("\x1b[0m", "").split("\r\n") == ["error: stopped; all is well", ""]
    assert "data: new" in (tmp_path / "logs" / "run.log").read_text()


def test_output_is_read_to_its_end_and_an_error_is_kept_apart():
    heard: list[str] = []
    with reading_output(heard.append) as output:
        code = "print('a bar: 1%|', end='\\r'); print('a note'); print('\\nerror: data: broken\\nsecond line')"
        subprocess.run([sys.executable, "-c", code], stdout=output.stream, check=True)
    assert heard == ["a bar: 1%|", "a note"]
    assert output.error == "data: broken\nsecond line"


def test_a_child_that_keeps_the_output_open_does_not_keep_the_run():
    with reading_output(lambda _text: None) as output:
        forgotten = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=output.stream)
        started_s = time.monotonic()
    forgotten.kill()
    forgotten.wait()
    assert time.monotonic() - started_s < 20


def test_a_terminal_that_is_gone_does_not_end_the_run():
    class Gone(io.StringIO):
        def write(self, _text):
            raise OSError(5, "Input/output error")

        def flush(self):
            raise OSError(5, "Input/output error")

    stream = displays._Forgiving(Gone())
    print("text", file=stream, flush=True)
