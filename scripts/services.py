"""What a team shares, on this machine: PostgreSQL, an S3 server, MLflow's tracking server and Prefect's server.

    python scripts/services.py start /srv/lilliput     # in this terminal, until Ctrl-C or `stop`
    . /srv/lilliput/client.env                         # in another: what flows, dvc, mlflow and prefect have to know
    python scripts/services.py stop /srv/lilliput

Everything is the servers' own, configured and started in order; all of it listens on 127.0.0.1 and lies in the folder,
passwords included, which are drawn at the first start. What is kept there is found again at the next start.
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
BIN = Path(sys.executable).parent  # the virtual environment's: mlflow, prefect and nanio are there


class ServiceError(Exception):
    """A service could not be started or ended; the message says which, why and what to do."""


@dataclass(frozen=True)
class Ports:
    """Where each server listens on loopback."""

    postgres: int
    s3: int
    mlflow: int
    prefect: int


class Services:
    """The servers of `folder`, as processes of this one."""

    def __init__(self, folder: Path, ports: Ports, postgres_user: str) -> None:
        self._folder, self._ports = folder, ports
        # PostgreSQL refuses to run as root.
        self._user = postgres_user if os.geteuid() == 0 else None
        self._secrets = _secrets(folder / SECRETS)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> dict[str, str]:
        """Starts them, each once what it needs answers; returns the environment of their clients."""
        (self._folder / "logs").mkdir(exist_ok=True)
        self._note()
        self._start_postgres()
        s3 = self._start_s3()
        mlflow, prefect = self._start_mlflow(s3), self._start_prefect()
        for name, address in {"mlflow": f"{mlflow}/health", "prefect": f"{prefect}/health"}.items():
            self._wait(name, partial(_is_well, address))
        return {"MLFLOW_TRACKING_URI": mlflow, "PREFECT_API_URL": prefect} | s3

    def watch(self) -> NoReturn:
        """Returns never: a server that ends by itself ends all."""
        while True:
            for name, process in self._running.items():
                if process.poll() is not None:
                    raise ServiceError(f"{name} ended with {process.returncode}{self._last_line(name)}")
            time.sleep(1)

    def stop(self) -> None:
        """Ends them, the last one started first."""
        for name, process in reversed(self._running.items()):
            # To PostgreSQL an interrupt means: end now, in order, without waiting for clients to leave.
            _end(process.pid, signal.SIGINT if name == "postgres" else signal.SIGTERM)
            process.wait()
        for name in (CLIENT, PROCESSES):
            (self._folder / name).unlink(missing_ok=True)

    def _start_postgres(self) -> None:
        programs, data = _postgres_programs(), self._folder / "postgres"
        passfile = self._folder / "pgpass"
        _write_private(passfile, f"{HOST}:*:*:{ROLE}:{self._secrets['POSTGRES_PASSWORD']}\n")
        if not (data / "PG_VERSION").exists():
            shutil.rmtree(data, ignore_errors=True)  # of an initdb that was stopped
            data.mkdir(mode=0o700)
            if self._user:
                shutil.chown(data, self._user)
                self._require_reachable(data)
            password = self._folder / "postgres-password"  # for as long as initdb needs it, and for its user's eyes
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
            make = f"SELECT 'CREATE DATABASE {name}' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname='{name}')"
            sql = f"{make}\\gexec\n"
            self._run("psql", programs / "psql", *connection, "-v", "ON_ERROR_STOP=1", stdin=sql, PGPASSFILE=passfile)

    def _start_s3(self) -> dict[str, str]:
        import boto3  # takes a second

        data, address = self._folder / "s3", f"http://{HOST}:{self._ports.s3}"
        data.mkdir(exist_ok=True)
        key, secret = self._secrets["S3_ACCESS_KEY"], self._secrets["S3_SECRET_KEY"]
        options = ["--data-dir", data, "--host", HOST, "--port", str(self._ports.s3), "--region", REGION]
        self._launch("s3", _program("nanio"), "serve", *options, NANIO_ACCESS_KEY=key, NANIO_SECRET_KEY=secret)
        self._wait("s3", lambda: _get(address).status_code == httpx.codes.FORBIDDEN)  # it asks for a signature
        client = boto3.client("s3", REGION, endpoint_url=address, aws_access_key_id=key, aws_secret_access_key=secret)
        known = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        for bucket in {MLFLOW_BUCKET, DVC_BUCKET} - known:
            client.create_bucket(Bucket=bucket)
        return {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": REGION,
        }

    def _start_mlflow(self, s3: Mapping[str, str]) -> str:
        # SQLAlchemy 2.1 takes a bare postgresql:// for psycopg 3.
        store = f"postgresql+psycopg2://{ROLE}@{HOST}:{self._ports.postgres}/mlflow"
        options = ["--backend-store-uri", store, "--artifacts-destination", f"s3://{MLFLOW_BUCKET}", "--workers", "1"]
        where = ["--host", HOST, "--port", str(self._ports.mlflow)]
        # Its artefacts go through it: clients need its address and none of its keys.
        more = {
            "PGPASSFILE": self._folder / "pgpass",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }  # jobs judge traces
        self._launch("mlflow", _program("mlflow"), "server", *where, *options, **s3, **more)
        return f"http://{HOST}:{self._ports.mlflow}"

    def _start_prefect(self) -> str:
        address = f"http://{HOST}:{self._ports.prefect}/api"
        database = f"postgresql+asyncpg://{ROLE}@{HOST}:{self._ports.postgres}/prefect"
        where = {"PREFECT_API_DATABASE_CONNECTION_URL": database, "PGPASSFILE": self._folder / "pgpass"}
        home = {"PREFECT_HOME": self._folder / "prefect", "PREFECT_API_URL": address}
        still = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
        # In memory, the default, leases are lost with the server, and the slots that they held stay taken for ever.
        storage = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
        # As prefect.toml has it for servers of the project's folder: no web page of another origin.
        pages = {
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{self._ports.prefect}",
            "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        }
        options = ["--host", HOST, "--port", str(self._ports.prefect)]
        environment = where | home | still | storage | pages
        self._launch("prefect", _program("prefect"), "server", "start", *options, **environment)
        return address

    def _launch(self, name: str, *command: str | Path, **environment: str | Path) -> None:
        user, group = self._identity(name)
        with (self._folder / "logs" / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                command,
                cwd=self._folder if name != "postgres" else "/",
                env=_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for this process, which ends the others in order
                user=user,
                group=group,
                extra_groups=None if user is None else [],
            )
        self._note()

    def _run(self, name: str, *command: str | Path, stdin: str = "", **environment: str | Path) -> None:
        """Runs a program of PostgreSQL to its end."""
        user, group = self._identity(name)
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

    def _identity(self, name: str) -> tuple[str, int] | tuple[None, None]:
        """User and group that a program runs as, if not as this one."""
        if self._user is None or name not in ("initdb", "postgres"):
            return None, None
        return self._user, pwd.getpwnam(self._user).pw_gid

    def _wait(self, name: str, answers: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._running[name].poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                if answers():
                    return
            time.sleep(0.2)
        raise ServiceError(f"{name} did not start{self._last_line(name)}")

    def _last_line(self, name: str) -> str:
        path = self._folder / "logs" / f"{name}.log"
        lines = path.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1].strip() if lines else 'it said nothing'} (its log: {path})"

    def _note(self) -> None:
        """Writes down which processes these are, for `stop` in another terminal."""
        processes = [psutil.Process(), *(psutil.Process(process.pid) for process in self._running.values())]
        lines = [f"{_identity(self._folder)}\n", *(f"{p.pid} {p.create_time()}\n" for p in processes)]
        _write_private(self._folder / PROCESSES, "".join(lines))

    def _require_reachable(self, folder: Path) -> None:
        if subprocess.run(["test", "-w", folder], user=self._user, extra_groups=[], check=False).returncode:
            raise ServiceError(
                f"{folder}: user {self._user}, who runs PostgreSQL, cannot get there; take another folder"
            )


def _program(name: str) -> str:
    """The program `name` of this environment."""
    found = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise ServiceError(f"{name} is not installed; pip install --requirement requirements-team.lock")
    return found


def _postgres_programs() -> Path:
    """The folder of PostgreSQL's programs: Debian keeps them off the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    found = shutil.which("initdb") or (debian[-1] if debian else None)
    if found is None:
        raise ServiceError("PostgreSQL is not installed; on Debian: apt-get install postgresql")
    return Path(found).resolve().parent


def _secrets(path: Path) -> dict[str, str]:
    """The passwords in `path`, drawn if there are none."""
    if not path.exists():
        names = ("POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY")
        _write_private(path, "".join(f"{name}={secrets.token_hex(20)}\n" for name in names))
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


def _write_private(path: Path, text: str, user: str | None = None) -> None:
    """Writes `text` for the eyes of `user` alone, or this one's; the file is whole or absent."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    if user:
        shutil.chown(partial, user)
    partial.rename(path)


def _environment(more: Mapping[str, str | Path]) -> dict[str, str]:
    """This process's environment without what names other servers or a proxy, and with `more`."""
    other = ("MLFLOW_", "PREFECT_", "AWS_", "PG", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(other)} | {
        name: str(value) for name, value in more.items()
    }


def _is_well(address: str) -> bool:
    return _get(address).is_success


def _get(address: str) -> httpx.Response:
    return httpx.get(address, trust_env=False)  # a proxy does not reach this machine's loopback


def _succeeds(*command: str | Path) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _end(pid: int, how: signal.Signals) -> None:
    """Ends a process and all that it started."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        process.send_signal(how)
    except psutil.NoSuchProcess:
        return
    for left in psutil.wait_procs(family, STOP_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()


def _identity(folder: Path) -> str:
    """Device and inode of `folder`, which stay when it is moved and differ in a copy."""
    found = folder.stat()
    return f"{found.st_dev}:{found.st_ino}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return free.getsockname()[1]


def _living(folder: Path) -> list[psutil.Process]:
    """The processes of `folder`: the one that started the others first."""
    path, found = folder / PROCESSES, []
    identity, *lines = path.read_text().splitlines() if path.exists() else [""]
    if not lines or identity != _identity(folder):  # of the folder that this one is a copy of
        return []
    for line in lines:
        pid, created = line.split()
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):  # and not another of the same number
                found.append(process)
    return found


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Folder = Annotated[Path, typer.Argument(help="where everything lies: databases, objects, passwords, logs")]
Port = Annotated[int, typer.Option(help="0: any that is free")]


@app.command()
def start(
    folder: Folder,
    postgres: Port = 5432,
    s3: Port = 9000,
    mlflow: Port = 5000,
    prefect: Port = 4200,
    postgres_user: Annotated[str, typer.Option(help="who runs PostgreSQL where this runs as root")] = "postgres",
) -> None:
    """Start the servers in this terminal, until Ctrl-C or `stop`; write client.env once all of them answer."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if _living(folder):
        _fail(f"{folder}: its servers run already; `stop` ends them")
    services = Services(
        folder, Ports(*(port or _free_port() for port in (postgres, s3, mlflow, prefect))), postgres_user
    )
    try:
        environment = services.start()
        _write_private(folder / CLIENT, "".join(f"export {key}={value}\n" for key, value in environment.items()))
        print(f"MLflow: {environment['MLFLOW_TRACKING_URI']}\nPrefect: {environment['PREFECT_API_URL']}")
        print(f"S3: {environment['AWS_ENDPOINT_URL']}, buckets {MLFLOW_BUCKET} and {DVC_BUCKET}")
        print(f"For clients: . {folder / CLIENT}\nCtrl-C ends all of them.", flush=True)
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
    """End the servers of FOLDER; what is stored stays."""
    living = _living(folder.absolute())
    if not living:
        _fail(f"{folder}: nothing runs")
    for process in living:  # the first one ends the others; were it killed, they are still to be ended
        _end(process.pid, signal.SIGTERM)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    app()
