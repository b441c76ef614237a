"""Prepares the environment of a command and of the processes it starts: proxies, folders for caches, the terminal.

It runs before Prefect, DVC and MLflow are imported: they read the environment at import.
"""

from __future__ import annotations

import getpass
import os
import sys
import tempfile
from collections.abc import MutableMapping
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from lilliput.errors import ConfigError

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
# requests reads the network; httpx and urllib compare whole names, so hosts in use are listed one by one.
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "127.0.0.0/8")
_CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_FALLBACK = Path(".cache") / "home"  # below the project, ignored by git and DVC
# Variable, its default below the home folder, its replacement below _FALLBACK.
_FOLDERS = (
    ("XDG_CACHE_HOME", ".cache", ".cache"),
    ("PREFECT_HOME", ".prefect", ".prefect"),
    ("MPLCONFIGDIR", ".config", ".config/matplotlib"),
)

Environment = MutableMapping[str, str]


def prepare(project: Path, environment: Environment = os.environ) -> None:
    """Prepares `environment` for this process and its children; what is replaced is said on stderr, once.

    Args:
        project: the folder of the code, which has room for caches where the home folder has none.
        environment: changed in place.
    """
    _open_missing_streams()
    bypass_proxies_for_loopback(environment)
    provide_home(project, environment)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # an ASCII terminal shows `?` for `±`; it does not end the run


def _open_missing_streams() -> None:
    """Gives a process whose stdout or stderr is closed the null device: else the next file opened takes its place."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
            setattr(sys, f"__{name}__", getattr(sys, name))


def bypass_proxies_for_loopback(environment: Environment = os.environ) -> None:
    """Adds loopback to NO_PROXY where a proxy is set: a proxy is another machine, and cannot reach this one's servers.

    Both spellings get the same value, because libraries prefer different ones. Brackets are removed: httpx rejects
    `[::1]`.
    """
    if not proxies_of(environment):
        return
    given = f"{environment.get('no_proxy', '')},{environment.get('NO_PROXY', '')}".split(",")
    hosts = [entry.strip().replace("[::1]", "::1") for entry in given] + [*_LOOPBACK, *_loopback_hosts(environment)]
    environment["NO_PROXY"] = environment["no_proxy"] = ",".join(dict.fromkeys(filter(None, hosts)))


def proxies_of(environment: Environment) -> list[str]:
    """The variables of `environment` that name a proxy."""
    return [name for upper in _PROXIES for name in (upper, upper.lower()) if environment.get(name)]


def certificates_of(environment: Environment) -> list[str]:
    """The variables of `environment` that name a file of trusted certificates."""
    return [name for name in _CERTIFICATES if environment.get(name)]


def is_loopback(host: str | None) -> bool:
    """Whether `host` is this machine: `localhost`, a name below it, 127.0.0.0/8 or ::1."""
    try:
        return ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost" or bool(host and host.endswith(".localhost"))


def _loopback_hosts(environment: Environment) -> list[str]:
    """The loopback hosts of all addresses in `environment`, such as PREFECT_API_URL=http://127.0.1.1:4200/api."""
    found = set[str]()
    for value in environment.values():
        try:
            host = urlsplit(value).hostname if "://" in value else None
        except ValueError:  # whoever uses that address says so
            continue
        if host and is_loopback(host):
            found.add(host)
    return sorted(found)


def provide_home(project: Path, environment: Environment = os.environ) -> None:
    """Sets variables to folders that can be written to where the home folder cannot, as in containers and services.

    HOME is replaced only where it is no folder at all: a read-only one may hold credentials and settings, so only
    caches and Prefect's database move out of it. A variable that is set already is left alone.

    Raises:
        ConfigError: the project has no room for them either.
    """
    home, fallback = _home(environment), project / _FALLBACK
    if home is None:
        named = {"HOME": fallback}
    else:
        named = {
            name: fallback / replacement
            for name, default, replacement in _FOLDERS
            if not environment.get(name) and not is_writable(home / default if (home / default).exists() else home)
        }
    _use(named, environment)
    _name_user(environment)


def _home(environment: Environment) -> Path | None:
    """The home folder; None if there is no such folder."""
    try:
        home = Path(environment["HOME"]) if "HOME" in environment else Path.home()
    except RuntimeError:  # no HOME, and a user without an entry in /etc/passwd
        return None
    return home if home.is_absolute() and home.is_dir() else None


def is_writable(folder: Path) -> bool:
    """Whether files can be created in `folder`, found by creating one: root passes any check of permission bits."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _use(named: dict[str, Path], environment: Environment) -> None:
    for name, folder in named.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{name}: there is no home folder that can be written to, and {folder} cannot be made "
                f"({error.strerror}); set {name} to a folder that can"
            ) from None
        environment[name] = str(folder)
    if named:
        values = ", ".join(f"{name}={folder}" for name, folder in named.items())
        print(f"note: the home folder cannot be written to; using {values}", file=sys.stderr)


def _name_user(environment: Environment) -> None:
    """Sets USER for a user without an entry in /etc/passwd: DVC and torch ask for the name and fail without one."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        environment["USER"] = f"uid-{os.getuid()}"


def require_usable_environment(environment: Environment = os.environ) -> None:
    """Rejects settings of the environment that break every run, before anything starts.

    Raises:
        ConfigError: lists all of them, each with its remedy.
    """
    problems = [
        f"{name}: no such file: {environment[name]}; name a file with certificates, or unset {name}"
        for name in certificates_of(environment)
        if not Path(environment[name]).exists()
    ]
    if _umask() & 0o700:
        problems.append(f"umask {_umask():04o}: a run could not read its own files; set `umask 022`")
    if problems:
        raise ConfigError(problems)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
