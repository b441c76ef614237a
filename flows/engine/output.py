"""How a command ends: with one message, also where standard output fails. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from lilliput.redaction import redacted


@contextmanager
def guarded_output() -> Iterator[None]:
    """Ends this process with one message if stdout is on a full disk, and silently if its reader (`| head`) ended."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        from lilliput.artifacts import disk_is_full

        if not (disk_is_full(error) or isinstance(error, BrokenPipeError)):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the rest of the buffer would fail again at exit
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None  # as typer and rich do
        fail(f"standard output: {error.strerror}; all results are recorded; the same command prints them again", 2)


def fail(message: str, code: int) -> NoReturn:
    """Ends this process with `message` on stderr."""
    print(f"\nerror: {redacted(message)}", file=sys.stderr)
    raise SystemExit(code)
