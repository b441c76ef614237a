"""How far a run is: which stages run, for how long, and how long the rest will take. Prints nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from flows.engine.stage import Stage

WIDTH = 80  # columns
_PRIOR_S = 60.0  # of predicted work: the first short stage alone says little about the speed of this machine
_NEARLY = 0.99  # of a stage that takes longer than predicted


@dataclass
class _Running:
    stage: Stage
    number: int
    started_s: float
    part: str = ""


class Progress:
    """The stages of a run and their times.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begin([], {}, workers=1)

    def begin(self, stages: Sequence[Stage], predicted_s: Mapping[str, float], workers: int) -> None:
        """Starts with `stages`; `predicted_s` is by name, without those that nothing is known about."""
        self._stages = {stage.name: stage for stage in stages}
        self._predicted_s, self._workers = dict(predicted_s), workers
        self._handled, self._due = 0, set[str]()
        self._running: dict[str, _Running] = {}
        self._took_s: dict[str, float] = {}
        self._skipped: list[tuple[int, Stage]] = []

    def expect(self, names: Collection[str]) -> None:
        """Sets which stages will run; the others are expected to be up to date."""
        self._due = set(names)

    def skip(self, stage: Stage) -> None:
        """Counts `stage`, which is up to date."""
        self._handled += 1
        self._due.discard(stage.name)
        self._skipped.append((self._handled, stage))

    def start(self, stage: Stage) -> str:
        """Notes that `stage` runs now; returns its line."""
        self._handled += 1
        self._due.add(stage.name)
        self._running[stage.name] = _Running(stage, self._handled, self._clock())
        return self._line(self._running[stage.name], self._eta())

    def note_part(self, stage: Stage, part: str) -> None:
        """Notes how far `stage` itself is, such as `quantise 37 %`."""
        if running := self._running.get(stage.name):
            running.part = part

    def end(self, stage: Stage, failed: bool) -> str:
        """Notes that `stage` has ended; returns its line."""
        running = self._running.pop(stage.name)
        took_s = self._clock() - running.started_s
        if failed:  # what needs it will not run; the prediction of the rest stays rough
            self._due.discard(stage.name)
        else:
            self._took_s[stage.name] = took_s
        return self._line(running, f"failed after {duration(took_s)}" if failed else duration(took_s))

    def skipped_line(self) -> str:
        """Returns one line for the stages that were skipped since the last call; empty if there are none."""
        skipped, self._skipped = self._skipped, []
        if not skipped:
            return ""
        numbers = f"{skipped[0][0]}–{skipped[-1][0]}" if len(skipped) > 1 else str(skipped[0][0])
        names = ", ".join(stage.name for _, stage in skipped)
        return shortened(f"[{numbers}/{len(self._stages)}] up to date: {names}")

    def lines(self) -> list[str]:
        """Returns a line for each running stage; the last one has the remaining time of the run."""
        lines = list(self._running.values())
        return [self._running_line(running, last=running is lines[-1]) for running in lines]

    def share(self) -> float:
        """Returns the share of the run's work that is done, from 0 to 1."""
        weights = {name: self._expected_s(name) or 1.0 for name in self._due | self._took_s.keys()}
        total = sum(weights.values())
        return sum(weights[name] * self._done(name, weights[name]) for name in weights) / total if total else 1.0

    def remaining_s(self) -> float | None:
        """Returns the predicted rest of the run in seconds; None if nothing is known about one of its stages."""
        left = {name: self._left_s(name) for name in self._due - self._took_s.keys()}
        known = {name: seconds for name, seconds in left.items() if seconds is not None}
        if len(known) < len(left):
            return None

        @cache
        def chain_s(name: str) -> float:
            return known.get(name, 0.0) + max(map(chain_s, self._needs(name)), default=0.0)

        longest = max(map(chain_s, known), default=0.0)
        return max(sum(known.values()) / self._workers, longest) * self._pace()

    def _needs(self, name: str) -> list[str]:
        return [needed for needed in self._stages[name].needs if needed in self._stages]

    def _pace(self) -> float:
        """Returns how many seconds this machine takes for a predicted second."""
        compared = [(self._took_s[name], self._predicted_s[name]) for name in self._took_s if name in self._predicted_s]
        took, predicted = (sum(times) for times in zip(*compared, strict=True)) if compared else (0.0, 0.0)
        return (took + _PRIOR_S) / (predicted + _PRIOR_S)

    def _expected_s(self, name: str) -> float | None:
        """Returns the time of a stage: measured, predicted, or the mean of what is known; None if nothing is."""
        if (known := self._took_s.get(name, self._predicted_s.get(name))) is not None:
            return known
        kind = name.partition("@")[0]
        measured = [seconds for other, seconds in self._took_s.items() if other.partition("@")[0] == kind]
        others = measured or [self._predicted_s[other] for other in self._due if other in self._predicted_s]
        return sum(others) / len(others) if others else None

    def _left_s(self, name: str) -> float | None:
        expected = self._expected_s(name)
        return None if expected is None else expected * (1.0 - self._done(name, expected))

    def _done(self, name: str, expected_s: float) -> float:
        if name in self._took_s:
            return 1.0
        if (running := self._running.get(name)) is None:
            return 0.0
        elapsed_s = self._clock() - running.started_s
        return min(elapsed_s / expected_s, _NEARLY) if expected_s else _NEARLY

    def _running_line(self, running: _Running, last: bool) -> str:
        took, eta = duration(self._clock() - running.started_s), self._eta() if last else ""
        line = self._line(running, took, running.part, eta)
        return line if running.stage.title in line else self._line(running, took, eta)

    def _line(self, running: _Running, *parts: str) -> str:
        begin = f"[{running.number}/{len(self._stages)}] "
        end = "".join(f" · {part}" for part in parts if part)
        return begin + shortened(running.stage.title, WIDTH - len(begin) - len(end)) + end

    def _eta(self) -> str:
        seconds = self.remaining_s()
        return "" if seconds is None else f"ETA {rough(seconds)}"


def shortened(text: str, width: int = WIDTH) -> str:
    """Returns `text` in one line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: max(0, width - 1)].rstrip()}…"


def duration(seconds: float) -> str:
    """Returns a time as `2:10`, or `1:02:10`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rough(seconds: float) -> str:
    """Returns a predicted time in words: `40 s`, `12 min`, `2 h 5 min`."""
    if seconds < 55:
        return f"{max(10, round(seconds, -1)):.0f} s"
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
