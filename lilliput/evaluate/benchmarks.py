"""Public benchmarks through lm-evaluation-harness, an optional extra: `pip install lilliput[benchmarks]`."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ruamel.yaml import YAML

from lilliput.config import BenchmarkConfig
from lilliput.errors import ConfigError

if TYPE_CHECKING:  # heavy, and require_benchmarks runs before every stage
    from transformers import PreTrainedTokenizerBase

    from lilliput.runtime.protocol import Runtime
    from lilliput.statistics.intervals import Estimate

# Tasks whose metrics need a continuation's likelihood or a greedy answer, and nothing else of the model.
SUPPORTED = {"multiple_choice", "generate_until"}


@dataclass(frozen=True)
class Benchmark:
    """One task's results: an estimate for each of its metrics, each item's values, and what it cost."""

    metrics: dict[str, Estimate]
    items: list[dict[str, float]]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        estimates = {name: estimate.as_dict() for name, estimate in self.metrics.items()}
        return {**estimates, "seconds": self.seconds, "items_per_s": len(self.items) / self.seconds}


def require_benchmarks(configs: Sequence[BenchmarkConfig], root: Path) -> None:
    """Refuses, before anything expensive starts, what could not be run.

    Raises:
        ConfigError: the extra is not installed, a task does not exist, a file is missing or not the pinned one; all
            problems at once.
    """
    if not configs:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluation.benchmarks: lm-evaluation-harness is not installed; pip install 'lilliput[benchmarks]', or "
            "leave the list empty"
        )
    problems = [problem for config in configs if (problem := _problem(config, root))]
    if problems:
        raise ConfigError(problems)


def run_benchmarks(
    runtime: Runtime,
    tokenizer: PreTrainedTokenizerBase,
    configs: Sequence[BenchmarkConfig],
    root: Path,
    seed: int,
    resamples: int,
) -> dict[str, Benchmark]:
    """Each task with the harness's own prompts and metrics, scored by `runtime`.

    TruthfulQA's MC2 is given a second time as `hallucination_rate`, 1 − MC2: the likelihood put on false answers.

    Args:
        runtime: the model.
        tokenizer: its tokenizer.
        configs: tasks, each from the hub or from a local file, and how many items.
        root: what files are relative to.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        ConfigError: a task is of a kind that the runtime cannot answer.
    """
    return {config.name: _run(runtime, tokenizer, config, root, seed, resamples) for config in configs}


def _run(
    runtime: Runtime, tokenizer: PreTrainedTokenizerBase, config: BenchmarkConfig, root: Path, seed: int, resamples: int
) -> Benchmark:
    import lm_eval

    from lilliput.evaluate.harness import HarnessModel

    task = load_task(config, root)
    started = time.perf_counter()
    results = cast("Any", lm_eval.simple_evaluate)(  # its decorator hides the signature
        model=HarnessModel(runtime, tokenizer),
        tasks=[task],
        limit=config.limit,
        bootstrap_iters=0,
        task_manager=_no_tasks(),
    )
    seconds = time.perf_counter() - started
    samples = sorted(next(iter(results["samples"].values())), key=lambda sample: sample["doc_id"])
    items = [{name: float(sample[name]) for name in sample["metrics"]} for sample in samples]
    metrics = {name: _estimate([item[name] for item in items], seed, resamples) for name in items[0]}
    if config.task == "truthfulqa_mc2":
        metrics["hallucination_rate"] = _complement(metrics["acc"])
    return Benchmark(metrics, items, seconds)


def load_task(config: BenchmarkConfig, root: Path) -> Any:
    """The harness's task of `config`, its data set replaced by the local file where one is given.

    Raises:
        ConfigError: the task is unknown or of a kind that the runtime cannot answer.
    """
    definition = _definition(config.task, root)
    assert definition, "require_benchmarks was not asked first"
    if config.file:
        task = _with_local_data(definition, config.task, (root / config.file).resolve())
    else:
        (task,) = _no_tasks().load([str(definition)])["tasks"].values()
    if task.OUTPUT_TYPE not in SUPPORTED:
        raise ConfigError(
            f"evaluation.benchmarks: {config.task} is of the kind {task.OUTPUT_TYPE}, which is not supported; choose a "
            f"task of the kind {' or '.join(sorted(SUPPORTED))}"
        )
    return task


def _with_local_data(definition: Path, name: str, data: Path) -> Any:
    """The task of `definition` on the rows of `data`, for whichever split it evaluates on."""
    splits = {split: str(data) for split in ("train", "validation", "test")}
    override = {
        "include": str(definition),
        "task": Path(name).stem,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits},
    }
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "task.yaml")
        YAML(typ="safe", pure=True).dump(override, file)
        (task,) = _no_tasks().load([str(file)])["tasks"].values()
    return task


def _no_tasks() -> Any:
    """A manager without the harness's index, whose building takes half a minute: tasks are loaded by their files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def _definition(task: str, root: Path) -> Path | None:
    """The YAML file that defines `task`: the user's own, or the harness's of that name."""
    if task.endswith(".yaml"):
        return path.resolve() if (path := root / task).is_file() else None
    by_name = next(iter(sorted(_task_folder().glob(f"**/{task}.yaml"))), None)
    if by_name:
        return by_name
    line = f"task: {task}"
    return next((path for path in _task_files() if line in path.read_text(encoding="utf-8").splitlines()), None)


def _task_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec and spec.origin, "require_benchmarks was not asked first"
    return Path(spec.origin).parent / "tasks"


def _task_files() -> Iterable[Path]:
    return sorted(_task_folder().glob("**/*.yaml"))


def _task_names() -> set[str]:
    """The tasks that the harness defines, without templates and without those that are of another kind."""
    names = set[str]()
    for file in _task_files():
        text = file.read_text(encoding="utf-8")
        kind = re.search(r"^output_type: *(\w+)", text, re.MULTILINE)
        if kind is None or kind[1] in SUPPORTED:
            names |= set(re.findall(r"^task: ([\w./-]+)$", text, re.MULTILINE))
    return names


def _problem(config: BenchmarkConfig, root: Path) -> str | None:
    place = f"evaluation.benchmarks: {config.task}"
    if not _definition(config.task, root):
        close = difflib.get_close_matches(config.task, _task_names(), n=3)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        return f"{place}: no such task or task file; {hint}`lm_eval ls tasks` lists all"
    if config.file is None:
        return None
    if not (root / config.file).is_file():
        return f"{place}: {config.file}: no such file; correct `file`, or leave it out to fetch the data from the hub"
    found = hashlib.sha256((root / config.file).read_bytes()).hexdigest()
    if found != config.sha256:
        return f"{place}: {config.file} has sha256 {found}, not {config.sha256}; correct `sha256` or restore the file"
    return None


def _complement(share: Estimate) -> Estimate:
    return replace(share, value=1.0 - share.value, low=1.0 - share.high, high=1.0 - share.low)


def _estimate(values: Sequence[float], seed: int, resamples: int) -> Estimate:
    from lilliput.statistics.intervals import mean, rate

    right_or_wrong = set(values) <= {0.0, 1.0}
    estimate = rate([value == 1.0 for value in values]) if right_or_wrong else mean(values, seed, resamples)
    assert estimate, "a task without items does not load"
    return estimate


def answer_rows(benchmarks: Mapping[str, Benchmark]) -> list[dict[str, Any]]:
    """A row an item for the answers file, so that two candidates can be compared item by item."""
    return [
        {"id": f"benchmark/{name}/{number}", **item}
        for name, benchmark in benchmarks.items()
        for number, item in enumerate(benchmark.items)
    ]
