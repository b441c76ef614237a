"""Paths of all results, relative to the project or workspace folder; the same paths as in dvc.yaml."""

from __future__ import annotations

import hashlib
from pathlib import Path

PARAMS = Path("params.yaml")
DATA = Path("data")
QUESTIONS = Path("data/questions.jsonl")
SOURCE = Path("models/source")
HUB_COMMITS = Path("hub-commits.json")  # commits of hub models that params.yaml names without one
REGISTRY = Path("registry.json")
PROMOTION = Path("promotion.json")
REPORT = Path("report")
SUMMARY = Path("summary")
BUNDLES = Path("bundles")
OFFLOAD = Path("offload")  # not under metrics/: promotion depends on metrics/, and offloading on promotion
MLRUNS = Path("mlruns")
LOGS = Path("logs")
_SYNTHETIC = Path("synthetic")
TEACHER_LOGITS = Path(".cache/teacher-logits")
OUTBOX = MLRUNS / "champions.jsonl"
SEARCH = Path("search.json")  # this and the next two exist only in the workspace of a search
STUDY = Path("search.db")
WINNER = Path("winner.yaml")


def is_workspace(folder: Path) -> bool:
    """Whether the absolute path `folder` is a workspace of the project (flows/engine/workspace.py)."""
    return folder.parent.name == "workspaces"


def model(candidate: str) -> Path:
    """The artefact of `candidate`; `source` is the fetched base model."""
    return Path("models") / candidate


def external_teacher(teacher: str) -> Path:
    """The fetched files of a pinned model outside the graph; not versioned, because `teacher` names them."""
    return Path(".cache/teachers") / hashlib.sha256(teacher.encode()).hexdigest()[:16]


def synthetic(name: str) -> Path:
    """Rows with the answers of a teacher behind an API, and their summary."""
    return _SYNTHETIC / name


def synthesis_progress(name: str) -> Path:
    """Answers received so far; removed once the rows are complete."""
    return Path(".cache/synthesis") / name


def checkpoints(candidate: str) -> Path:
    """Training state of `candidate` to resume from; removed once the artefact is complete."""
    return Path("models/.checkpoints") / candidate


def cost(stage: str) -> Path:
    """Cost of `stage`: seconds, CPU-seconds, peak memory."""
    return Path("costs") / f"{stage}.json"


def times(sha256: str) -> Path:
    """When the stage ran whose record has this digest; stays on the machine."""
    return Path(".cache/times") / f"{sha256}.json"


def metrics(candidate: str) -> Path:
    """The evaluation record of `candidate`."""
    return Path("metrics") / f"{candidate}.json"


def answers(candidate: str) -> Path:
    """The answer of `candidate` to each question."""
    return Path("answers") / f"{candidate}.jsonl"


def caching(candidate: str) -> Path:
    """Savings and errors of caching on `candidate`."""
    return Path("metrics/caching") / f"{candidate}.json"


def caching_answers(candidate: str) -> Path:
    """The answers of `candidate` to each query of the stream, without and with caching."""
    return Path("answers/caching") / f"{candidate}.jsonl"


def compiled(candidate: str, target: str) -> Path:
    """The compiled model of `candidate` for `target`."""
    return Path("compiled") / candidate / target


def compiled_answers(compiled_name: str) -> Path:
    """The answer of a compiled model, for example `pocket-gguf`, to each question."""
    return Path("answers/compiled") / f"{compiled_name}.jsonl"


def devices(compiled_name: str) -> Path:
    """Measurements of a compiled model, for example `pocket-gguf`, on each device of its target."""
    return Path("metrics/devices") / f"{compiled_name}.json"


def offload(device: str) -> Path:
    """Answers of `device` and its edge server, the fitted router and the cache threshold."""
    return OFFLOAD / device


def cache_threshold(device: str) -> Path:
    """The fitted similarity threshold of the answer cache on `device`."""
    return offload(device) / "cache.json"


def offload_record(device: str) -> Path:
    """Benefits and costs of each offloading policy on `device`."""
    return OFFLOAD / f"{device}.json"


def logged(device: str) -> Path:
    """The model version in MLflow that has the offloading results of `device`."""
    return Path("logged") / f"{device}.json"


def simulation(device: str) -> Path:
    """Simulated traffic of each policy of `device`; made on request, no stage depends on it."""
    return Path("simulations") / f"{device}.json"


def log(stage: str) -> Path:
    """The log of the last run of `stage`."""
    return LOGS / f"{stage.replace('@', '-')}.log"


# By kind of stage, the record that has `seconds` and `peak_rss_bytes`.
RECORDS = {
    "compress": cost,
    "evaluate": metrics,
    "caching": caching,
    "compile": lambda name: cost(f"compile-{name}"),
    "devices": devices,
    "offload": offload_record,
}
