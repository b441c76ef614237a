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
    """Prepares `environment` for this process and its children; reports each replacement on stderr.

    Args:
        project: the folder of the code, which holds the caches if the home folder cannot.
        environment: changed in place.
    """
    _open_missing_streams()
    bypass_proxies_for_loopback(environment)
    provide_home(project, environment)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # an ASCII terminal shows `?` for `±`; it does not end the run


def _open_missing_streams() -> None:
    """Opens the null device for a closed stdout or stderr; otherwise the next opened file would take its number."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
            setattr(sys, f"__{name}__", getattr(sys, name))


def bypass_proxies_for_loopback(environment: Environment = os.environ) -> None:
    """Adds loopback to NO_PROXY if a proxy is set: a proxy on another machine cannot reach servers on this one.

    Both spellings get the same value, because libraries prefer different ones. Brackets are removed: httpx rejects
    `[::1]`.
    """
    if not proxies_of(environment):
        return
    given = f"{environment.get('no_proxy', '')},{environment.get('NO_PROXY', '')}".split(",")
    hosts = [entry.strip().replace("[::1]", "::1") for entry in given] + [*_LOOPBACK, *_loopback_hosts(environment)]
    environment["NO_PROXY"] = environment["no_proxy"] = ",".join(dict.fromkeys(filter(None, hosts)))


def proxies_of(environment: Environment) -> list[str]:
    """Returns the variables of `environment` that name a proxy."""
    return [name for upper in _PROXIES for name in (upper, upper.lower()) if environment.get(name)]


def certificates_of(environment: Environment) -> list[str]:
    """Returns the variables of `environment` that name a file of trusted certificates."""
    return [name for name in _CERTIFICATES if environment.get(name)]


def is_loopback(host: str | None) -> bool:
    """Whether `host` is this machine: `localhost`, a name below it, 127.0.0.0/8 or ::1."""
    try:
        return ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost" or bool(host and host.endswith(".localhost"))


def _loopback_hosts(environment: Environment) -> list[str]:
    """Returns the loopback hosts of all addresses in `environment`, such as PREFECT_API_URL=http://127.0.1.1:4200/api."""
    hosts = set[str]()
    for value in environment.values():
        try:
            host = urlsplit(value).hostname if "://" in value else None
        except ValueError:  # the library that uses this address reports the error
            continue
        if host and is_loopback(host):
            hosts.add(host)
    return sorted(hosts)


def provide_home(project: Path, environment: Environment = os.environ) -> None:
    """Points variables to writable folders if the home folder is missing or read-only, as in containers and services.

    HOME is replaced only if it is not a folder: a read-only home may hold credentials and settings, so only caches and
    Prefect's database move out of it. Variables that are already set stay unchanged.

    Raises:
        ConfigError: the project folder is not writable either.
    """
    home, fallback = _home(environment), project / _FALLBACK
    if home is None:
        folders = {"HOME": fallback}
    else:
        folders = {
            name: fallback / replacement
            for name, default, replacement in _FOLDERS
            if not environment.get(name) and not is_writable(home / default if (home / default).exists() else home)
        }
    _set_folders(folders, environment)
    _name_user(environment)


def _home(environment: Environment) -> Path | None:
    """Returns the home folder; None if there is no such folder."""
    try:
        home = Path(environment["HOME"]) if "HOME" in environment else Path.home()
    except RuntimeError:  # no HOME, and a user without an entry in /etc/passwd
        return None
    return home if home.is_absolute() and home.is_dir() else None


def is_writable(folder: Path) -> bool:
    """Whether files can be created in `folder`. Creates one, because root passes every check of permission bits."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _set_folders(folders: dict[str, Path], environment: Environment) -> None:
    for name, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{name}: there is no writable home folder, and {folder} cannot be created "
                f"({error.strerror}); set {name} to a writable folder"
            ) from None
        environment[name] = str(folder)
    if folders:
        values = ", ".join(f"{name}={folder}" for name, folder in folders.items())
        print(f"note: the home folder cannot be written to; using {values}", file=sys.stderr)


def _name_user(environment: Environment) -> None:
    """Sets USER for a user without an entry in /etc/passwd: DVC and torch ask for the name and fail without one."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        environment["USER"] = f"uid-{os.getuid()}"


def require_usable_environment(environment: Environment = os.environ) -> None:
    """Rejects settings of the environment that would break every run.

    Raises:
        ConfigError: lists all problems, each with its remedy.
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
