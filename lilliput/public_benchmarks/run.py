"""Runs public benchmarks: BFCL, and others with lm-evaluation-harness (`pip install lilliput[benchmarks]`)."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ruamel.yaml import YAML

from lilliput.config import BenchmarkConfig
from lilliput.errors import ConfigError
from lilliput.public_benchmarks import bfcl
from lilliput.records import Estimate, Figure
from lilliput.wheels import default_cache

if TYPE_CHECKING:  # slow to import, and require_benchmarks runs before every stage
    from transformers import PreTrainedTokenizerBase

    from lilliput.runtime.protocol import AnsweringRuntime

# Kinds of task that need only a continuation's likelihood or a greedy answer.
SUPPORTED = {"multiple_choice", "generate_until"}


@dataclass(frozen=True)
class Benchmark:
    """Results of one task: an estimate per metric, the values of each item, and the seconds it took."""

    metrics: dict[str, Estimate]
    items: list[dict[str, float]]
    seconds: float

    @property
    def record(self) -> dict[str, Figure | float]:
        """The form used in a record."""
        figures = {name: Figure.of(estimate) for name, estimate in self.metrics.items()}
        return figures | {"seconds": self.seconds, "items_per_s": len(self.items) / self.seconds}


def require_benchmarks(configs: Sequence[BenchmarkConfig], root: Path) -> None:
    """Rejects benchmarks that could not run, before anything expensive starts.

    Downloads the data of BFCL if necessary.

    Raises:
        ConfigError: the extra is not installed, a task does not exist, or a file is missing or has another sha256;
            lists all problems.
        SourceError: the data of BFCL cannot be downloaded.
    """
    with_harness = [config for config in configs if config.task not in bfcl.CATEGORIES]
    if with_harness and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluation.benchmarks: lm-evaluation-harness is not installed; pip install 'lilliput[benchmarks]', or "
            "leave the list empty"
        )
    problems = [problem for config in configs if (problem := _problem(config, root))]
    if problems:
        raise ConfigError(problems)
    if len(with_harness) < len(configs):
        bfcl.fetch_tasks(default_cache())


def require_template(tokenizer: PreTrainedTokenizerBase, configs: Sequence[BenchmarkConfig]) -> None:
    """Checks that the model can be shown the functions of the benchmarks' tasks.

    Raises:
        DataError: a task has functions and the chat template does not show them.
    """
    if any(config.task in bfcl.CATEGORIES for config in configs):
        from lilliput.chat.template import require_tools

        require_tools(tokenizer)


def run_benchmarks(
    runtime: AnsweringRuntime,
    tokenizer: PreTrainedTokenizerBase,
    configs: Sequence[BenchmarkConfig],
    root: Path,
    seed: int,
    resamples: int,
) -> dict[str, Benchmark]:
    """Runs each task, scored by `runtime`: BFCL with the model's own chat template, others as the harness does.

    Adds `hallucination_rate` = 1 − MC2 for TruthfulQA: the likelihood of false answers.

    Args:
        runtime: the model.
        tokenizer: of the model.
        configs: tasks, each from the hub or from a local file, with a limit of items.
        root: folder that file paths are relative to.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        ConfigError: a task is of an unsupported kind.
    """
    return {config.name: _run(runtime, tokenizer, config, root, seed, resamples) for config in configs}


def _run(
    runtime: AnsweringRuntime,
    tokenizer: PreTrainedTokenizerBase,
    config: BenchmarkConfig,
    root: Path,
    seed: int,
    resamples: int,
) -> Benchmark:
    if config.task in bfcl.CATEGORIES:
        tasks = bfcl.read_tasks(config.task, bfcl.fetch_tasks(default_cache()), config.limit)
        answer = partial(bfcl.answer_tasks, runtime, tokenizer, tasks)
    else:
        answer = partial(_harness_items, runtime, tokenizer, config, load_task(config, root))
    started = time.perf_counter()
    items = answer()
    seconds = time.perf_counter() - started
    metrics = {name: _estimate([item[name] for item in items], seed, resamples) for name in items[0]}
    if config.task == "truthfulqa_mc2":
        metrics["hallucination_rate"] = _complement(metrics["acc"])
    return Benchmark(metrics, items, seconds)


def _harness_items(
    runtime: AnsweringRuntime, tokenizer: PreTrainedTokenizerBase, config: BenchmarkConfig, task: Any
) -> list[dict[str, float]]:
    """Returns the metrics of each item, with the harness's own prompts and metrics."""
    import lm_eval

    from lilliput.public_benchmarks.harness import HarnessModel

    results = cast("Any", lm_eval.simple_evaluate)(  # its decorator hides the signature
        model=HarnessModel(runtime, tokenizer),
        tasks=[task],
        limit=config.limit,
        bootstrap_iters=0,
        task_manager=_no_tasks(),
    )
    samples = sorted(next(iter(results["samples"].values())), key=lambda sample: sample["doc_id"])
    return [{name: float(sample[name]) for name in sample["metrics"]} for sample in samples]


def load_task(config: BenchmarkConfig, root: Path) -> Any:
    """Loads the harness's task of `config`; a local file replaces its data set.

    Raises:
        ConfigError: the task is of an unsupported kind.
    """
    definition = _definition(config.task, root)
    assert definition, "call require_benchmarks first"
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
    """Loads the task of `definition` with the rows of `data` as every split."""
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
    """Returns a task manager without the harness's index, which takes 30 s to build; tasks are loaded from files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def _definition(task: str, root: Path) -> Path | None:
    """Finds the YAML file that defines `task`: the user's file, or the harness's file of that name."""
    if task.endswith(".yaml"):
        return path.resolve() if (path := root / task).is_file() else None
    by_name = next(iter(sorted(_task_folder().glob(f"**/{task}.yaml"))), None)
    if by_name:
        return by_name
    line = f"task: {task}"
    return next((path for path in _task_files() if line in path.read_text(encoding="utf-8").splitlines()), None)


def _task_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec and spec.origin, "call require_benchmarks first"
    return Path(spec.origin).parent / "tasks"


def _task_files() -> Iterable[Path]:
    return sorted(_task_folder().glob("**/*.yaml"))


def _task_names() -> set[str]:
    """Returns the names of the harness's supported tasks, without templates."""
    names = set[str]()
    for file in _task_files():
        text = file.read_text(encoding="utf-8")
        kind = re.search(r"^output_type: *(\w+)", text, re.MULTILINE)
        if kind is None or kind[1] in SUPPORTED:
            names |= set(re.findall(r"^task: ([\w./-]+)$", text, re.MULTILINE))
    return names


def _problem(config: BenchmarkConfig, root: Path) -> str | None:
    place = f"evaluation.benchmarks: {config.task}"
    if config.task in bfcl.CATEGORIES:
        return (
            None if config.file is None else f"{place}: its data come from a pinned wheel; remove `file` and `sha256`"
        )
    if not _definition(config.task, root):
        close = difflib.get_close_matches(config.task, _task_names() | bfcl.CATEGORIES.keys(), n=3)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        return f"{place}: no such task or task file; {hint}`lm_eval ls tasks` lists all"
    if config.file is None:
        return None
    if not (root / config.file).is_file():
        return f"{place}: {config.file}: no such file; correct `file`, or leave it out to fetch the data from the hub"
    sha256 = hashlib.sha256((root / config.file).read_bytes()).hexdigest()
    if sha256 != config.sha256:
        return f"{place}: {config.file} has sha256 {sha256}, not {config.sha256}; correct `sha256` or restore the file"
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
    """Returns one row per item for the answers file, so that candidates can be compared item by item."""
    return [
        {"id": f"benchmark/{name}/{number}", **item}
        for name, benchmark in benchmarks.items()
        for number, item in enumerate(benchmark.items)
    ]
