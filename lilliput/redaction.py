"""Keeps secrets of the environment out of written text, and out of processes that open untrusted files."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
# HF_TOKEN, LILLIPUT_EDGE_KEY, AWS_SECRET_ACCESS_KEY, AWS_ACCESS_KEY_ID, MLFLOW_TRACKING_PASSWORD, … but not AWS_REGION.
_SECRET_NAME = re.compile(
    r"(?:.*_)?(?:TOKEN|KEY|KEY_ID|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|AUTH_STRING)", re.IGNORECASE
)
_CREDENTIALS = re.compile(r"://[^/?#\s]*@")
_MIN_LENGTH = 6  # a short value such as `KEY=1` is no secret, and would hide every 1


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return _SECRET_NAME.fullmatch(name) is not None


def has_credentials(address: str) -> bool:
    """Whether `address` contains a user or a password, as in https://user:password@host."""
    return _CREDENTIALS.search(address) is not None


def secrets_in(text: str) -> list[str]:
    """Returns the names of the environment's secrets whose values are in `text`."""
    return sorted(name for name, value in _secrets().items() if value in text)


def redacted(text: str) -> str:
    """Returns `text` without the environment's secrets and without credentials in addresses."""
    for value in sorted(
        _secrets().values(), key=len, reverse=True
    ):  # longest first: one value may be the beginning of another
        text = text.replace(value, HIDDEN)
    return _CREDENTIALS.sub(f"://{HIDDEN}@", text)


def _secrets() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if is_secret(name) and len(value) >= _MIN_LENGTH}


def environment_without_secrets() -> dict[str, str]:
    """Returns this process's environment without secrets, for a process that opens a model."""
    return {name: value for name, value in os.environ.items() if not is_secret(name)}
