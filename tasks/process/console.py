"""A stage's own log: everything its libraries print goes there; progress bars and errors go to the terminal as well."""

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
EXIT_TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h: worth another try
EXIT_STOPPED, EXIT_TERMINATED = 130, 143  # as a shell tells of SIGINT and SIGTERM


class _WithoutSecrets(io.TextIOWrapper):
    """A log in which nothing of this process's secrets is written, whoever prints them."""

    def write(self, text: str, /) -> int:
        try:
            super().write(redacted(text))
        except OSError as error:
            if not disk_is_full(error):  # the work itself will say so, where a person sees it
                raise
        return len(text)


class _ProgressToTerminal(io.TextIOBase):
    """A stand-in for stderr: what holds a carriage return is a progress bar, the rest is chatter for the log."""

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self.terminal, self.log = terminal, log

    def write(self, text: str) -> int:
        # A bar ends with a bare newline, which belongs to it.
        (self.terminal if "\r" in text or text == "\n" else self.log).write(redacted(text))
        return len(text)

    def flush(self) -> None:
        self.terminal.flush()
        self.log.flush()

    def isatty(self) -> bool:
        return self.terminal.isatty()


@contextmanager
def logging_to(path: Path) -> Iterator[TextIO]:
    """Sends what this process prints to `path`, and yields the terminal for what a person must see.

    Raises:
        ConfigError: `path` cannot be written.
    """
    with _open_log(path) as log, os.fdopen(os.dup(2), "w", buffering=1) as terminal:
        if not terminal.isatty():
            os.environ.setdefault("TQDM_MININTERVAL", "20")  # a log wants a line now and then, not ten a second
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)  # what libraries write without asking Python
        sys.stdout, sys.stderr = log, _ProgressToTerminal(terminal, log)
        logging.captureWarnings(True)
        logging.basicConfig(stream=log, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        try:
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # the log is closed, these still point there


def _open_log(path: Path) -> _WithoutSecrets:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Nothing is kept back in memory, which a full disk would not take later either.
        return _WithoutSecrets(path.open("wb", buffering=0), encoding="utf-8", write_through=True)
    except OSError as error:
        raise ConfigError(
            f"{path}: the log cannot be written ({error.strerror}); remove it, or make it writable for this user"
        ) from None


def last_error(path: Path) -> str | None:
    """The error a stage ended with, from its log; None if it left none."""
    if not path.exists():
        return None
    _, found, message = path.read_text(encoding="utf-8", errors="replace").rpartition(f"\n{ERROR}")
    return message.strip() if found else None
