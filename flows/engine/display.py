"""Shows a run: one bar with the running stages on a terminal, plain lines elsewhere, the log lines of a deployment."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from threading import RLock
from typing import IO, Any, Protocol, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flows.engine.plan import predicted_seconds
from flows.engine.progress import WIDTH, Progress, shortened
from flows.engine.run_context import deployment_id, log_to_file, run_logger
from flows.engine.stage import Stage
from lilliput.redaction import redacted

Predict = Callable[[Sequence[str]], Mapping[str, float]]
_BAR = re.compile(r"^(?:(?P<label>[^:|]*): *)?(?P<percent>\d+)%\|")  # as tqdm writes it


class Display(Protocol):
    """Receives what happens in a run."""

    def begin(self, stages: Sequence[Stage], workers: int) -> None:
        """Starts with `stages`, of which `workers` run at a time."""
        ...

    def expect(self, names: Collection[str]) -> None:
        """Says which stages will run, as far as is known."""
        ...

    def skip(self, stage: Stage) -> None:
        """Says that `stage` is up to date."""
        ...

    def start(self, stage: Stage) -> None:
        """Says that `stage` runs now."""
        ...

    def hear(self, stage: Stage, text: str) -> None:
        """Passes on a line, or the state of a progress bar, that the process of `stage` wrote. From any thread."""
        ...

    def end(self, stage: Stage, failed: bool) -> None:
        """Says that `stage` has ended."""
        ...

    def message(self, text: str) -> None:
        """Shows and logs a line of the run itself."""
        ...


class LineDisplay:
    """Shows a run in lines without control characters.

    Args:
        predict: returns the predicted seconds of stages by name, as far as they are known.
    """

    def __init__(self, predict: Predict) -> None:
        self._predict, self._progress = predict, Progress()
        self._lock = RLock()  # of `_progress`; never held while something is shown, which may wait for another thread

    def begin(self, stages: Sequence[Stage], workers: int) -> None:
        """See `Display`."""
        predicted_s = self._predict([stage.name for stage in stages])
        with self._lock:
            self._progress.begin(stages, predicted_s, workers)

    def expect(self, names: Collection[str]) -> None:
        """See `Display`."""
        with self._lock:
            self._progress.expect(names)

    def skip(self, stage: Stage) -> None:
        """See `Display`; one line comes for all of them, with the next stage that runs."""
        with self._lock:
            self._progress.skip(stage)

    def start(self, stage: Stage) -> None:
        """See `Display`."""
        self._show_skipped()
        with self._lock:
            line = self._progress.start(stage)
        self.show_start(line)

    def hear(self, stage: Stage, text: str) -> None:
        """See `Display`; shows lines, not the states of a bar."""
        if not (bar := _BAR.match(text)):
            self.show(redacted(text))
            return
        label = shortened((bar["label"] or "").strip(), 20)
        with self._lock:
            self._progress.note_part(stage, f"{label} {bar['percent']} %".strip())

    def end(self, stage: Stage, failed: bool) -> None:
        """See `Display`."""
        with self._lock:
            line = self._progress.end(stage, failed)
        self.show(line)

    def message(self, text: str) -> None:
        """See `Display`."""
        run_logger().info("%s", text)
        self.show(text)

    def close(self) -> None:
        """Shows the stages that were skipped at the end."""
        self._show_skipped()

    def show_start(self, line: str) -> None:
        """Shows the line of a stage that starts."""
        self.show(line)

    def show(self, text: str) -> None:
        """Shows `text`."""
        with suppress(OSError):  # a full disk or a reader that left does not end the run
            print(text, file=sys.stderr or io.StringIO(), flush=True)  # None: stderr was closed before the start

    def _show_skipped(self) -> None:
        with self._lock:
            line = self._progress.skipped_line()
        if line:
            self.show(line)


class LogDisplay(LineDisplay):
    """Shows a run in the log of its Prefect deployment."""

    def message(self, text: str) -> None:
        """See `Display`."""
        self.show(text)

    def show(self, text: str) -> None:
        """Logs `text`."""
        run_logger().info("%s", text)


class BarDisplay(LineDisplay):
    """Shows the running stages and one bar at the end of a terminal, and a line above for each that has ended."""

    def __init__(self, predict: Predict, console: Console) -> None:
        super().__init__(predict)
        self._live = Live(
            console=console,
            get_renderable=self._running,
            refresh_per_second=1,  # a stage may measure times on the same cores
            transient=True,
            redirect_stdout=False,
            vertical_overflow="crop",
        )

    def __enter__(self) -> BarDisplay:
        self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._live.stop()

    def show_start(self, line: str) -> None:
        """Redraws the running stages: the line would be there twice."""
        del line
        self._live.refresh()

    def show(self, text: str) -> None:
        """Shows `text` above the bar."""
        self._live.console.print(text, markup=False, highlight=False)

    def _running(self) -> Group:
        with self._lock:
            lines, share = self._progress.lines(), self._progress.share()
        if not lines:
            return Group()
        width = min(WIDTH, self._live.console.width)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=1.0, completed=share, width=width - 6), f"{share:4.0%}")
        return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines), bar)


@contextmanager
def open_display(folder: Path) -> Iterator[Display]:
    """Opens the display of a run in `folder`, whose details go to `logs/run.log`, or to Prefect in a flow run.

    Raises:
        ConfigError: the log cannot be written.
    """
    with log_to_file(folder), _opened(partial(predicted_seconds, folder=folder)) as display:
        yield display
        display.close()


def _opened(predict: Predict) -> AbstractContextManager[LineDisplay]:
    if deployment_id():
        return nullcontext(LogDisplay(predict))
    if not sys.stderr or not sys.stderr.isatty() or os.environ.get("CI"):
        return nullcontext(LineDisplay(predict))
    console = Console(file=cast("IO[str]", _Forgiving(sys.stderr)))
    return nullcontext(LineDisplay(predict)) if console.is_dumb_terminal else BarDisplay(predict, console)


class _Forgiving:
    """A stream whose write errors do not end the run: a terminal may be closed meanwhile."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
