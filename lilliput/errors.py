"""Every error Lilliput raises on purpose.

LilliputError            exit code 2: the message says what, where and what to do
├── ConfigError          params.yaml (or a file it names) is not usable
│   └── BusyError        another run is at work in the folder
├── SourceError          a model or a wheel cannot be fetched, verified or opened
├── DataError            a corpus or a question set is not usable
├── ArtifactError        a model directory is missing, incomplete or not what it says
├── StrategyError        a strategy cannot be applied to this parent
├── CompileError         a checkpoint cannot be compiled for a target, or what came out is another model
├── PublishError         a bundle cannot be put on the hub
├── RegistryError        MLflow does not answer, or refuses
└── StageError           a stage of the pipeline ended badly in its own process
"""


class LilliputError(Exception):
    """A problem the reader can mend; anything else is a bug and keeps its traceback."""


class ConfigError(LilliputError):
    """The configuration is refused. `problems` holds one line per problem found."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))


class BusyError(ConfigError):
    """Another run is at work in the folder; once it ends, the same command succeeds."""


class SourceError(LilliputError):
    """A source model or wheel cannot be fetched, verified or opened; `temporary` if another try may help."""

    def __init__(self, message: str, *, temporary: bool = False) -> None:
        self.temporary = temporary
        super().__init__(message)


class DataError(LilliputError):
    """A corpus or a question set is not usable."""


class ArtifactError(LilliputError):
    """A model directory is missing, incomplete, altered or not what it says it is."""


class StrategyError(LilliputError):
    """A compression strategy cannot be applied to this parent with these settings."""


class CompileError(LilliputError):
    """A checkpoint cannot be compiled for a target, or the compiled model is not the one that was measured."""


class PublishError(LilliputError):
    """A bundle is not its device's champion, or the hub does not take it."""


class RegistryError(LilliputError):
    """MLflow does not answer, or refuses; `temporary` if another try may help."""

    def __init__(self, message: str, *, temporary: bool = False) -> None:
        self.temporary = temporary
        super().__init__(message)


class StageError(LilliputError):
    """A stage ended badly in its own process; its log holds the whole story."""


class TemporaryError(StageError):
    """A stage could not fetch something; another try may succeed."""
