"""Secrets stay in the environment: out of what is written, and out of the processes that open foreign files."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
# HF_TOKEN, LILLIPUT_EDGE_KEY, AWS_SECRET_ACCESS_KEY, AWS_ACCESS_KEY_ID, MLFLOW_TRACKING_PASSWORD, … but not AWS_REGION.
_SECRET_NAME = re.compile(
    r"(?:.*_)?(?:TOKEN|KEY|KEY_ID|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|AUTH_STRING)", re.IGNORECASE
)
_CREDENTIALS = re.compile(r"://[^/?#\s]*@")
_SHORTEST = 6  # `KEY=1` is no secret, and would hide every 1


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return _SECRET_NAME.fullmatch(name) is not None


def has_credentials(address: str) -> bool:
    """Whether a user or a password stands in `address`, as in https://user:password@host."""
    return _CREDENTIALS.search(address) is not None


def secrets_in(text: str) -> list[str]:
    """The names of the environment's secrets whose values stand in `text`."""
    return sorted(name for name, value in _secrets().items() if value in text)


def redacted(text: str) -> str:
    """`text` without the secrets of the environment and without what stands before the @ of an address."""
    for value in sorted(_secrets().values(), key=len, reverse=True):  # one may be the beginning of another
        text = text.replace(value, HIDDEN)
    return _CREDENTIALS.sub(f"://{HIDDEN}@", text)


def _secrets() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if is_secret(name) and len(value) >= _SHORTEST}


def environment_without_secrets() -> dict[str, str]:
    """This process's environment for one that opens a model: it has no use for a token."""
    return {name: value for name, value in os.environ.items() if not is_secret(name)}
