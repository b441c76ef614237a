"""Reads what the process of a stage writes to its terminal: progress bars, notes and its error."""

from __future__ import annotations

import codecs
import os
import re
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from tasks.process.console import ERROR

_POLL_S = 0.5
_CHUNK_BYTES = 2**16


class StageOutput:
    """The output of one process.

    Args:
        receive: gets each line and each state of a progress bar, from another thread; not the error.

    Attributes:
        stream: for the process to write to; close it here once the process has its copy.
        error: the stage's message from its first `error:` on; empty without one.
    """

    def __init__(self, receive: Callable[[str], None]) -> None:
        self._receive, self._ended = receive, threading.Event()
        self._reading, writing = os.pipe()
        self.stream: IO[bytes] = os.fdopen(writing, "wb")
        self._error_lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def error(self) -> str:
        """The message of the stage without its mark."""
        return "\n".join(self._error_lines).removeprefix(ERROR).strip()

    def close(self) -> None:
        """Reads what the ended process has left, also if a child that it forgot keeps the pipe open."""
        self._ended.set()
        self._thread.join()
        os.close(self._reading)

    def _read(self) -> None:
        decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
        while True:
            ended = self._ended.is_set()  # before the last look: everything has been written then
            if not select.select([self._reading], [], [], 0.0 if ended else _POLL_S)[0]:
                if ended:
                    break
                continue
            if not (content := os.read(self._reading, _CHUNK_BYTES)):
                break
            *lines, rest = re.split(r"[\r\n]", rest + decoder.decode(content))
            for line in lines:
                self._take(line)
        self._take(rest)

    def _take(self, line: str) -> None:
        if self._error_lines or line.startswith(ERROR):
            self._error_lines.append(line)
        elif line.strip():
            self._receive(line.rstrip())


@contextmanager
def reading_output(receive: Callable[[str], None]) -> Iterator[StageOutput]:
    """Yields the output of a process that is started and ends in the block."""
    output = StageOutput(receive)
    try:
        yield output
    finally:
        output.stream.close()
        output.close()
