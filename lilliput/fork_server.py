"""A process that has imported the large libraries and forks one child for each Python command.

Importing torch and transformers takes 4 to 9 s; a forked child has them at once. The server imports libraries only,
never this project: a child runs the code that is on disk when it starts, as a new process would. It opens no model and
starts no thread, so a child shares no state with any other.

`lilliput.forked` starts it and is its client. The server ends, with all its
children, when its standard input is closed. A child is killed when its client closes or shuts the connection.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = (
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "peft",
    "safetensors.torch",
    "scipy.stats",
    "pydantic",
    "ruamel.yaml",
)
_HEADER = struct.Struct("!I")
_ARGUMENTS_START, _ARGUMENTS_END = 47, 48  # fields of /proc/self/stat, from 0
_STREAMS = 3
_STDERR = 2
_POPULATE_READ = 22  # of madvise, since Linux 5.14
_PRESENT = 63  # bit of an entry of /proc/self/pagemap
Pages = list[tuple[int, int]]  # address and length, in bytes


@dataclass(frozen=True)
class Job:
    """What a forked child runs: `python -m <module> <arguments>` in `folder`."""

    module: str
    arguments: list[str]
    folder: str
    environment: dict[str, str]

    def run(self, library_pages: Pages) -> None:
        """Replaces this process's folder, environment, streams and arguments, then runs the module as `__main__`.

        Args:
            library_pages: `resident_file_pages` of the server. A forked child has them only once it reads them: its
                measured memory would be 80 MB smaller than that of a new process.
        """
        for address, length in library_pages:
            _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _POPULATE_READ)
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        _open_standard_streams()
        sys.path[0] = self.folder
        sys.argv = [self.module, *self.arguments]
        _show_command([sys.executable, "-m", self.module, *self.arguments])
        torch: Any = sys.modules["torch"]
        # The child's pool of threads must be made by one thread (PyTorch 2.13).
        torch.set_num_threads(torch.get_num_threads())
        runpy.run_module(self.module, run_name="__main__", alter_sys=True)


@dataclass(frozen=True)
class _Child:
    pid: int
    handle: int  # a pidfd
    connection: socket.socket


_libc = ctypes.CDLL(None)


class Server:
    """Forks children for the clients of `listener`."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        # A new process would have it, too. A terminal sends Ctrl-C to every process; the client ends this one.
        self._interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(0, selectors.EVENT_READ)
        self._children: dict[int, _Child] = {}

    def serve(self) -> Job:
        """Serves for ever; returns in each child, with its job."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    if job := self._fork():
                        return job
                elif key.fileobj == 0:
                    self._end()
                elif key.data in self._children:
                    self._follow(self._children[key.data], ended=isinstance(key.fileobj, int))

    def _fork(self) -> Job | None:
        """Forks a child for the next client; returns its job in the child, None in the server."""
        connection, _ = self._listener.accept()
        try:
            job, streams = _receive(connection)
            if threading.active_count() > 1:
                raise RuntimeError("a library started a thread; forking would copy its locks")
            pid = os.fork()
        except (OSError, ValueError, EOFError) as error:
            print(f"not forked: {error!r}", file=sys.stderr, flush=True)
            connection.close()
            return None
        if not pid:
            self._become_child(connection, streams)
            return job
        for stream in streams:
            os.close(stream)
        child = _Child(pid, os.pidfd_open(pid), connection)
        self._children[pid] = child
        self._selector.register(child.handle, selectors.EVENT_READ, pid)
        self._selector.register(connection, selectors.EVENT_READ, pid)
        with suppress(OSError):  # the client went away: `_follow` kills the child
            connection.sendall(_HEADER.pack(pid))
        return None

    def _become_child(self, connection: socket.socket, streams: list[int]) -> None:
        signal.signal(signal.SIGINT, self._interrupt)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        self._selector.close()
        for child in self._children.values():
            os.close(child.handle)
            child.connection.close()
        connection.close()
        self._listener.close()

    def _follow(self, child: _Child, ended: bool) -> None:
        """Reports the end of `child`, or kills it because its client went away."""
        if not ended:
            self._selector.unregister(child.connection)
            signal.pidfd_send_signal(child.handle, signal.SIGKILL)
            return
        _, status, usage = os.wait4(child.pid, 0)
        report = {"code": os.waitstatus_to_exitcode(status), "cpu_s": usage.ru_utime + usage.ru_stime}
        self._selector.unregister(child.handle)
        with suppress(KeyError):
            self._selector.unregister(child.connection)
        with suppress(OSError):
            child.connection.sendall(json.dumps(report).encode())
        child.connection.close()
        os.close(child.handle)
        del self._children[child.pid]

    def _end(self) -> NoReturn:
        for child in self._children.values():
            signal.pidfd_send_signal(child.handle, signal.SIGKILL)
        os._exit(0)


def _receive(connection: socket.socket) -> tuple[Job, list[int]]:
    header, streams, _, _ = socket.recv_fds(connection, _HEADER.size, _STREAMS)
    (size,) = _HEADER.unpack(header)
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise EOFError
        content += part
    return Job(**json.loads(content)), streams


def _open_standard_streams() -> None:
    """Replaces Python's standard streams as a new process makes them: the server's own belong to its log file."""
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old: Any = getattr(sys, name)
        mode = "w" if number else "r"
        new: Any = os.fdopen(number, mode, encoding=old.encoding, errors=old.errors, closefd=False)
        lines = number == _STDERR or os.isatty(number)
        new.reconfigure(line_buffering=lines and not unbuffered, write_through=unbuffered)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def _show_command(command: list[str]) -> None:
    """Shows `command` as this process's command line, as `ps` prints it.

    It replaces the server's own, whose length stays; slashes before the interpreter's path fill the rest.
    """
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    start, end = (int(fields[number - 2]) for number in (_ARGUMENTS_START, _ARGUMENTS_END))
    text = "\0".join(command).encode() + b"\0"
    if start and len(text) <= end - start:
        with suppress(OSError), Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(text.rjust(end - start, b"/"))


def resident_file_pages() -> Pages:
    """Returns the pages of files, such as libraries, that are in this process's memory."""
    import numpy as np

    size, pages = os.sysconf("SC_PAGE_SIZE"), []
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            span, access, _, _, inode, *_ = line.split()
            if inode == "0" or access[0] != "r":
                continue
            start, end = (int(address, 16) for address in span.split("-"))
            pagemap.seek(start // size * 8)
            present = np.frombuffer(pagemap.read((end - start) // size * 8), np.uint64) >> np.uint64(_PRESENT)
            edges = np.flatnonzero(np.diff(present.astype(np.int8), prepend=0, append=0))
            pages += [(start + int(a) * size, int(b - a) * size) for a, b in edges.reshape(-1, 2)]
    return pages


def main() -> None:
    """Imports the libraries, then serves on the socket that the first argument names; the second only makes room."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    for library in LIBRARIES:
        importlib.import_module(library)
    server, library_pages = Server(listener), resident_file_pages()
    listener.listen()
    server.serve().run(library_pages)


if __name__ == "__main__":
    main()
