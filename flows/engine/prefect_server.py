"""Whether Prefect has a server: only then a run is a flow run there, and Prefect is imported."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

_VARIABLES = {"PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"}
_KEYS = {"api", "home", "profiles_path"}  # of prefect.toml: an address, or where profiles are


def server_configured(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Prefect has the address of a server, from any of its sources, for a run in the working directory."""
    if "prefect" not in sys.modules and not _may_be_configured(environment):
        return False
    from prefect.settings import PREFECT_API_URL  # takes two CPU-seconds

    return bool(PREFECT_API_URL.value())


def _may_be_configured(environment: Mapping[str, str]) -> bool:
    """Whether one of Prefect's sources of settings could hold an address; Prefect itself then says which one wins."""
    if _VARIABLES & {name.upper() for name in environment}:
        return True
    home = Path(environment.get("PREFECT_HOME") or "~/.prefect").expanduser()
    if (home / "profiles.toml").exists():
        return True
    dotenv = Path(".env")
    if dotenv.is_file() and "PREFECT" in dotenv.read_text(encoding="utf-8", errors="replace").upper():
        return True
    settings = _table(Path("prefect.toml")), _table(Path("pyproject.toml")).get("tool", {}).get("prefect", {})
    return any(_KEYS & table.keys() for table in settings)


def _table(path: Path) -> dict[str, dict[str, dict[str, object]]]:
    """Returns the content of a TOML file; empty if it does not exist or is damaged, as Prefect reads it then."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
