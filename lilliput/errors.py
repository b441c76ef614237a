"""Every error that Lilliput raises deliberately.

LilliputError            exit code 2: the message says what, where and what to do
├── ConfigError          params.yaml (or a file it names) is invalid
│   └── BusyError        another run is active in the folder
├── SourceError          a model or a wheel cannot be downloaded, verified or opened
├── DataError            a corpus or a question set is invalid
├── ArtifactError        a model directory is missing, incomplete or altered
├── StrategyError        a strategy cannot be applied to this parent
├── CompileError         a checkpoint cannot be compiled for a target, or the compiled model differs from it
├── PublishError         a bundle cannot be uploaded to the hub
├── RegistryError        MLflow does not answer, or rejects the request
└── StageError           a stage of the pipeline failed in its own process
    └── TemporaryError   a download failed; another attempt may succeed
"""

from collections.abc import Mapping
from typing import Any


def message_of(problem: Mapping[str, Any]) -> str:
    """Returns the message of a problem that pydantic found, without pydantic's label for our own messages."""
    return str(problem["msg"]).removeprefix("Value error, ")


class LilliputError(Exception):
    """A problem that the user can solve; any other exception is a bug and keeps its traceback."""


class ConfigError(LilliputError):
    """The configuration is invalid. `problems` has one line per problem."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))


class BusyError(ConfigError):
    """Another run is active in the folder; the same command works after it has ended."""


class SourceError(LilliputError):
    """A source model or wheel cannot be downloaded, verified or opened; `temporary` if another attempt may succeed."""

    def __init__(self, message: str, *, temporary: bool = False) -> None:
        self.temporary = temporary
        super().__init__(message)


class DataError(LilliputError):
    """A corpus or a question set is invalid."""


class ArtifactError(LilliputError):
    """A model directory is missing, incomplete, altered or unsafe."""


class StrategyError(LilliputError):
    """A compression strategy cannot be applied to this parent with these settings."""


class CompileError(LilliputError):
    """A checkpoint cannot be compiled for a target, or the compiled model differs from the checkpoint."""


class PublishError(LilliputError):
    """A bundle is not its device's champion, or the hub rejects it."""


class RegistryError(LilliputError):
    """MLflow does not answer, or rejects the request; `temporary` if another attempt may succeed."""

    def __init__(self, message: str, *, temporary: bool = False) -> None:
        self.temporary = temporary
        super().__init__(message)


class StageError(LilliputError):
    """A stage failed in its own process; its log has the details."""


class TemporaryError(StageError):
    """A stage could not download something; another attempt may succeed."""
