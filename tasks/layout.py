"""Where everything lies, relative to the project's (or a workspace's) folder: the same paths as in dvc.yaml."""

from __future__ import annotations

from pathlib import Path

PARAMS = Path("params.yaml")
DATA = Path("data")
QUESTIONS = Path("data/questions.jsonl")
SOURCE = Path("models/source")
REGISTRY = Path("registry.json")
PROMOTION = Path("promotion.json")
REPORT = Path("report")
BUNDLES = Path("bundles")
OFFLOAD = Path("offload")  # not under metrics/: promotion waits for those, and offloading for promotion
MLRUNS = Path("mlruns")
TEACHER_LOGITS = Path(".cache/teacher-logits")
CHANGES = MLRUNS / "champions.jsonl"
SEARCH = Path("search.json")  # these three in the workspace of a search only
STUDY = Path("search.db")
WINNER = Path("winner.yaml")


def is_workspace(folder: Path) -> bool:
    """Whether `folder`, absolute, is a workspace beside the project (flows/engine/workspace.py)."""
    return folder.parent.name == "workspaces"


def model(candidate: str) -> Path:
    """The artefact of `candidate`; `source` is the fetched base model."""
    return Path("models") / candidate


def checkpoints(candidate: str) -> Path:
    """What a killed training of `candidate` goes on from; gone when the artefact is there."""
    return Path("models/.checkpoints") / candidate


def cost(stage: str) -> Path:
    """What making `stage` cost: seconds, CPU-seconds, peak memory."""
    return Path("costs") / f"{stage}.json"


def metrics(candidate: str) -> Path:
    """The evaluation record of `candidate`."""
    return Path("metrics") / f"{candidate}.json"


def answers(candidate: str) -> Path:
    """What `candidate` answered to each question."""
    return Path("answers") / f"{candidate}.jsonl"


def caching(candidate: str) -> Path:
    """What caching saves and spoils on `candidate`."""
    return Path("metrics/caching") / f"{candidate}.json"


def caching_answers(candidate: str) -> Path:
    """What `candidate` answered to each query of the stream, without and with caching."""
    return Path("answers/caching") / f"{candidate}.jsonl"


def compiled(candidate: str, target: str) -> Path:
    """What `candidate` was compiled to for `target`."""
    return Path("compiled") / candidate / target


def devices(compiled_name: str) -> Path:
    """What the devices made of a compiled model, `pocket-gguf` say."""
    return Path("metrics/devices") / f"{compiled_name}.json"


def offload(device: str) -> Path:
    """What stands between `device` and its edge server: both's answers, the fitted router, the cache's threshold."""
    return OFFLOAD / device


def offload_record(device: str) -> Path:
    """What each policy of offloading brings and costs on `device`."""
    return OFFLOAD / f"{device}.json"


def logged(device: str) -> Path:
    """The version that MLflow has the offloading of `device` with."""
    return Path("logged") / f"{device}.json"


def simulation(device: str) -> Path:
    """What days of traffic did to each policy of `device`; made by hand, no stage waits for it."""
    return Path("simulations") / f"{device}.json"


def log(stage: str) -> Path:
    """The log of the last run of `stage`."""
    return Path("logs") / f"{stage.replace('@', '-')}.log"


# Where each kind of stage writes what it took: `seconds` and `peak_rss_bytes`, among other things.
RECORDS = {
    "compress": cost,
    "evaluate": metrics,
    "caching": caching,
    "compile": lambda name: cost(f"compile-{name}"),
    "devices": devices,
    "offload": offload_record,
}
