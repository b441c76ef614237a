"""The log of a stage: takes all output of its libraries; progress bars and errors also go to the terminal."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lilliput.artifacts import disk_is_full
from lilliput.errors import ConfigError
from lilliput.redaction import redacted

ERROR = "error: "
EXIT_REFUSED = 2
EXIT_TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h: a retry may succeed
EXIT_STOPPED, EXIT_TERMINATED = 130, 143  # as a shell reports SIGINT and SIGTERM


class _RedactedLog(io.TextIOWrapper):
    """A text file that removes this process's secrets from everything written to it."""

    def write(self, text: str, /) -> int:
        try:
            super().write(redacted(text))
        except OSError as error:
            if not disk_is_full(error):  # the stage itself reports a full disk on the terminal
                raise
        return len(text)


class _ProgressToTerminal(io.TextIOBase):
    """Replaces stderr: text with a carriage return is a progress bar for the terminal, the rest goes to the log."""

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self.terminal, self.log = terminal, log

    def write(self, text: str) -> int:
        # A progress bar ends with a bare newline.
        (self.terminal if "\r" in text or text == "\n" else self.log).write(redacted(text))
        return len(text)

    def flush(self) -> None:
        self.terminal.flush()
        self.log.flush()

    def isatty(self) -> bool:
        return self.terminal.isatty()


@contextmanager
def logging_to(path: Path) -> Iterator[TextIO]:
    """Redirects the output of this process to `path` and yields the terminal.

    Raises:
        ConfigError: `path` cannot be written.
    """
    with open_log(path) as log, os.fdopen(os.dup(2), "w", buffering=1) as terminal:
        if not terminal.isatty():
            os.environ.setdefault("TQDM_MININTERVAL", "20")  # seconds; a file needs no ten updates a second
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)  # for native code, which bypasses sys.stderr
        sys.stdout, sys.stderr = log, _ProgressToTerminal(terminal, log)
        logging.captureWarnings(True)
        logging.basicConfig(stream=log, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        try:
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # the log is about to be closed


def open_log(path: Path) -> TextIO:
    """Opens a log for writing, without the text of an earlier one; secrets are left out of what is written.

    Raises:
        ConfigError: `path` cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: text kept in memory could not be written to a full disk later either.
        return _RedactedLog(path.open("wb", buffering=0), encoding="utf-8", write_through=True)
    except OSError as error:
        raise ConfigError(
            f"{path}: the log cannot be written ({error.strerror}); remove it, or make it writable for this user"
        ) from None


def last_error(path: Path) -> str | None:
    """Returns the error message at the end of a stage's log; None if there is none."""
    if not path.exists():
        return None
    _, marker, message = path.read_text(encoding="utf-8", errors="replace").rpartition(f"\n{ERROR}")
    return message.strip() if marker else None
