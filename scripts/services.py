"""Runs the services of a team on this machine: PostgreSQL, an S3 server, MLflow's and Prefect's servers.

    python scripts/services.py start /srv/lilliput     # in this terminal, until Ctrl-C or `stop`
    . /srv/lilliput/client.env                         # in another: the settings of flows, dvc, mlflow and prefect
    python scripts/services.py stop /srv/lilliput

Starts each program with its configuration, in order. All of them listen on 127.0.0.1 and store their data in the
folder, with the passwords, which are drawn at the first start. The next start finds all data again.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import httpx
import psutil
import typer

HOST = "127.0.0.1"
REGION = "us-east-1"
ROLE = "lilliput"
MLFLOW_BUCKET, DVC_BUCKET = "lilliput-mlflow", "lilliput-dvc"
CLIENT, PROCESSES, SECRETS = "client.env", "processes", "secrets.env"
START_S, STOP_S = 300.0, 120.0
BIN = Path(sys.executable).parent  # of the virtual environment, which has mlflow, prefect and nanio


class ServiceError(Exception):
    """A service could not be started or stopped; the message says which, why and what to do."""


@dataclass(frozen=True)
class Ports:
    """The port of each server on loopback."""

    postgres: int
    s3: int
    mlflow: int
    prefect: int


class Services:
    """The servers of `folder`, as child processes."""

    def __init__(self, folder: Path, ports: Ports, postgres_user: str) -> None:
        self._folder, self._ports = folder, ports
        # PostgreSQL refuses to run as root.
        self._user = postgres_user if os.geteuid() == 0 else None
        self._secrets = _secrets(folder / SECRETS)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> dict[str, str]:
        """Starts the servers in order of dependency; returns the environment of their clients."""
        (self._folder / "logs").mkdir(exist_ok=True)
        self._record_processes()
        self._start_postgres()
        s3 = self._start_s3()
        mlflow, prefect = self._start_mlflow(s3), self._start_prefect()
        for name, address in {"mlflow": f"{mlflow}/health", "prefect": f"{prefect}/health"}.items():
            self._wait(name, partial(_is_healthy, address))
        return {"MLFLOW_TRACKING_URI": mlflow, "PREFECT_API_URL": prefect} | s3

    def watch(self) -> NoReturn:
        """Waits for ever; raises ServiceError when a server ends by itself."""
        while True:
            for name, process in self._running.items():
                if process.poll() is not None:
                    raise ServiceError(f"{name} ended with {process.returncode}{self._last_line(name)}")
            time.sleep(1)

    def stop(self) -> None:
        """Stops the servers in reverse order."""
        for name, process in reversed(self._running.items()):
            # At SIGINT PostgreSQL shuts down cleanly without waiting for its clients.
            _stop_process(process.pid, signal.SIGINT if name == "postgres" else signal.SIGTERM)
            process.wait()
        for name in (CLIENT, PROCESSES):
            (self._folder / name).unlink(missing_ok=True)

    def _start_postgres(self) -> None:
        programs, data = _postgres_programs(), self._folder / "postgres"
        passfile = self._folder / "pgpass"
        _write_private(passfile, f"{HOST}:*:*:{ROLE}:{self._secrets['POSTGRES_PASSWORD']}\n")
        if not (data / "PG_VERSION").exists():
            shutil.rmtree(data, ignore_errors=True)  # of an interrupted initdb
            data.mkdir(mode=0o700)
            if self._user:
                shutil.chown(data, self._user)
                self._require_reachable(data)
            password = self._folder / "postgres-password"  # removed after initdb; only its user can read it
            _write_private(password, self._secrets["POSTGRES_PASSWORD"], self._user)
            try:
                options = ["--auth=scram-sha-256", f"--username={ROLE}", f"--pwfile={password}", "-E", "UTF8"]
                self._run("initdb", programs / "initdb", "-D", data, *options)
            finally:
                password.unlink()
        port = str(self._ports.postgres)
        self._launch("postgres", programs / "postgres", "-D", data, "-h", HOST, "-p", port, "-k", "")
        connection = ["-h", HOST, "-p", port, "-U", ROLE, "-d", "postgres"]
        self._wait("postgres", lambda: _succeeds(programs / "pg_isready", *connection))
        for name in ("mlflow", "prefect"):
            create = (
                f"SELECT 'CREATE DATABASE {name}' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname='{name}')"
            )
            sql = f"{create}\\gexec\n"
            self._run("psql", programs / "psql", *connection, "-v", "ON_ERROR_STOP=1", stdin=sql, PGPASSFILE=passfile)

    def _start_s3(self) -> dict[str, str]:
        import boto3  # the import takes a second

        data, address = self._folder / "s3", f"http://{HOST}:{self._ports.s3}"
        data.mkdir(exist_ok=True)
        key, secret = self._secrets["S3_ACCESS_KEY"], self._secrets["S3_SECRET_KEY"]
        options = ["--data-dir", data, "--host", HOST, "--port", str(self._ports.s3), "--region", REGION]
        self._launch("s3", _program("nanio"), "serve", *options, NANIO_ACCESS_KEY=key, NANIO_SECRET_KEY=secret)
        self._wait("s3", lambda: _get(address).status_code == httpx.codes.FORBIDDEN)  # it requires a signature
        client = boto3.client("s3", REGION, endpoint_url=address, aws_access_key_id=key, aws_secret_access_key=secret)
        existing = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        for bucket in {MLFLOW_BUCKET, DVC_BUCKET} - existing:
            client.create_bucket(Bucket=bucket)
        return {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": REGION,
        }

    def _start_mlflow(self, s3: Mapping[str, str]) -> str:
        # SQLAlchemy 2.1 uses psycopg 3 for a bare postgresql://.
        store = f"postgresql+psycopg2://{ROLE}@{HOST}:{self._ports.postgres}/mlflow"
        options = ["--backend-store-uri", store, "--artifacts-destination", f"s3://{MLFLOW_BUCKET}", "--workers", "1"]
        listen = ["--host", HOST, "--port", str(self._ports.mlflow)]
        # The server proxies artefacts: clients need its address, but no key of S3.
        environment = {
            "PGPASSFILE": self._folder / "pgpass",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # jobs evaluate traces
        }
        self._launch("mlflow", _program("mlflow"), "server", *listen, *options, **s3, **environment)
        return f"http://{HOST}:{self._ports.mlflow}"

    def _start_prefect(self) -> str:
        address = f"http://{HOST}:{self._ports.prefect}/api"
        database = f"postgresql+asyncpg://{ROLE}@{HOST}:{self._ports.postgres}/prefect"
        database_settings = {"PREFECT_API_DATABASE_CONNECTION_URL": database, "PGPASSFILE": self._folder / "pgpass"}
        home = {"PREFECT_HOME": self._folder / "prefect", "PREFECT_API_URL": address}
        no_analytics = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
        # In memory (the default) leases are lost with the server, and their slots stay taken for ever.
        storage = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
        # As in prefect.toml: refuse web pages of other origins.
        origins = {
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{self._ports.prefect}",
            "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        }
        options = ["--host", HOST, "--port", str(self._ports.prefect)]
        environment = database_settings | home | no_analytics | storage | origins
        self._launch("prefect", _program("prefect"), "server", "start", *options, **environment)
        return address

    def _launch(self, name: str, *command: str | Path, **environment: str | Path) -> None:
        user, group = self._user_of(name)
        with (self._folder / "logs" / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                command,
                cwd=self._folder if name != "postgres" else "/",
                env=_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches only this process, which stops the others in order
                user=user,
                group=group,
                extra_groups=None if user is None else [],
            )
        self._record_processes()

    def _run(self, name: str, *command: str | Path, stdin: str = "", **environment: str | Path) -> None:
        """Runs a program of PostgreSQL and waits for its end."""
        user, group = self._user_of(name)
        done = subprocess.run(
            command,
            cwd="/",
            env=_environment(environment),
            input=stdin,
            text=True,
            capture_output=True,
            check=False,
            user=user,
            group=group,
            extra_groups=None if user is None else [],
        )
        if done.returncode:
            raise ServiceError(f"{name}: {done.stderr.strip() or done.stdout.strip()}")

    def _user_of(self, name: str) -> tuple[str, int] | tuple[None, None]:
        """Returns the user and group of a program; None for those of this process."""
        if self._user is None or name not in ("initdb", "postgres"):
            return None, None
        return self._user, pwd.getpwnam(self._user).pw_gid

    def _wait(self, name: str, responds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._running[name].poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                if responds():
                    return
            time.sleep(0.2)
        raise ServiceError(f"{name} did not start{self._last_line(name)}")

    def _last_line(self, name: str) -> str:
        path = self._folder / "logs" / f"{name}.log"
        lines = path.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1].strip() if lines else 'it wrote no message'} (its log: {path})"

    def _record_processes(self) -> None:
        """Writes the ids of all processes, for `stop` in another terminal."""
        processes = [psutil.Process(), *(psutil.Process(process.pid) for process in self._running.values())]
        lines = [f"{_folder_id(self._folder)}\n", *(f"{p.pid} {p.create_time()}\n" for p in processes)]
        _write_private(self._folder / PROCESSES, "".join(lines))

    def _require_reachable(self, folder: Path) -> None:
        if subprocess.run(["test", "-w", folder], user=self._user, extra_groups=[], check=False).returncode:
            raise ServiceError(f"{folder}: user {self._user}, who runs PostgreSQL, has no access; use another folder")


def _program(name: str) -> str:
    """Returns the path of the program `name`, first of this environment."""
    path = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    if path is None:
        raise ServiceError(f"{name} is not installed; pip install --requirement requirements-team.lock")
    return path


def _postgres_programs() -> Path:
    """Returns the folder of PostgreSQL's programs, which is not on the PATH of Debian."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    initdb = shutil.which("initdb") or (debian[-1] if debian else None)
    if initdb is None:
        raise ServiceError("PostgreSQL is not installed; on Debian: apt-get install postgresql")
    return Path(initdb).resolve().parent


def _secrets(path: Path) -> dict[str, str]:
    """Returns the passwords in `path`; draws them if the file does not exist."""
    if not path.exists():
        names = ("POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY")
        _write_private(path, "".join(f"{name}={secrets.token_hex(20)}\n" for name in names))
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


def _write_private(path: Path, text: str, user: str | None = None) -> None:
    """Writes `text` atomically to a file that only `user`, or the user of this process, can read."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    if user:
        shutil.chown(partial, user)
    partial.rename(path)


def _environment(more: Mapping[str, str | Path]) -> dict[str, str]:
    """Returns the environment of this process without settings of other servers or proxies, plus `more`."""
    excluded = ("MLFLOW_", "PREFECT_", "AWS_", "PG", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(excluded)} | {
        name: str(value) for name, value in more.items()
    }


def _is_healthy(address: str) -> bool:
    return _get(address).is_success


def _get(address: str) -> httpx.Response:
    return httpx.get(address, trust_env=False)  # a proxy does not reach the loopback of this machine


def _succeeds(*command: str | Path) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _stop_process(pid: int, number: signal.Signals) -> None:
    """Stops a process and its children; kills those that do not end."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
    for remaining in psutil.wait_procs(family, STOP_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            remaining.kill()


def _folder_id(folder: Path) -> str:
    """Returns device and inode of `folder`: unchanged when it is moved, different in a copy."""
    info = folder.stat()
    return f"{info.st_dev}:{info.st_ino}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return free.getsockname()[1]


def _running_processes(folder: Path) -> list[psutil.Process]:
    """Returns the running processes of `folder`, first the parent of the others."""
    path, processes = folder / PROCESSES, []
    folder_id, *lines = path.read_text().splitlines() if path.exists() else [""]
    if not lines or folder_id != _folder_id(folder):  # the record of a folder that was copied here
        return []
    for line in lines:
        pid, created = line.split()
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):  # not a later process with the same pid
                processes.append(process)
    return processes


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Folder = Annotated[Path, typer.Argument(help="of the databases, objects, passwords and logs")]
Port = Annotated[int, typer.Option(help="0: any free port")]


@app.command()
def start(
    folder: Folder,
    postgres: Port = 5432,
    s3: Port = 9000,
    mlflow: Port = 5000,
    prefect: Port = 4200,
    postgres_user: Annotated[str, typer.Option(help="user of PostgreSQL if this runs as root")] = "postgres",
) -> None:
    """Start the servers in this terminal, until Ctrl-C or `stop`; write client.env once all of them respond."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if _running_processes(folder):
        _fail(f"{folder}: its servers are already running; `stop` stops them")
    services = Services(
        folder, Ports(*(port or _free_port() for port in (postgres, s3, mlflow, prefect))), postgres_user
    )
    try:
        environment = services.start()
        _write_private(folder / CLIENT, "".join(f"export {key}={value}\n" for key, value in environment.items()))
        print(f"MLflow: {environment['MLFLOW_TRACKING_URI']}\nPrefect: {environment['PREFECT_API_URL']}")
        print(f"S3: {environment['AWS_ENDPOINT_URL']}, buckets {MLFLOW_BUCKET} and {DVC_BUCKET}")
        print(f"For clients: . {folder / CLIENT}\nCtrl-C stops all of them.", flush=True)
        services.watch()
    except KeyboardInterrupt:
        print("stopping")
    except (ServiceError, KeyError, OSError) as error:
        _fail(str(error))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        services.stop()


@app.command()
def stop(folder: Folder) -> None:
    """Stop the servers of FOLDER; their data stays."""
    processes = _running_processes(folder.absolute())
    if not processes:
        _fail(f"{folder}: nothing runs")
    for process in processes:  # the first one stops the others, unless it was killed
        _stop_process(process.pid, signal.SIGTERM)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    app()
