"""The code that `dvc.yaml` names for each stage is the code that the stage imports: nothing is missing, nothing extra.

A missing file leaves a result up to date that new code would change. An extra one makes results again for nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import grimp
import pytest
from ruamel.yaml import YAML

from lilliput.config import AutogptqTarget, GgufTarget, OnnxTarget, StrategiesConfig

PROJECT = Path(__file__).resolve().parents[1]
# Code that a stage imports and need not depend on. Their own imports are not followed.
EXEMPT = {
    "lilliput.artifacts": "how files are written, not what they hold",
    "lilliput.child": "ends a process with its parent",
    "lilliput.config": "settings: a stage depends on the values that it reads (`params`)",
    "lilliput.errors": "messages",
    "lilliput.forked": "starts a process, which runs the same code",
    "lilliput.gguf_source.runtime_check": (
        "accepts or rejects a source; its agreement in the cost record is not measured again for changed code"
    ),
    "lilliput.graph": "accepts or rejects settings",
    "lilliput.hub": "fetches files of a commit, whose sums the hub states",
    "lilliput.machine": "reads the memory of the machine",
    "lilliput.params": "settings",
    "lilliput.records": "the form of records; a stage depends on the code that fills them",
    "lilliput.redaction": "messages",
    "lilliput.resident": "reads memory and returns it to the system",
    "lilliput.supported_sources": "accepts or rejects files",
    "lilliput.target_rules": "accepts or rejects settings",
    "lilliput.untrusted": "accepts or rejects files",
    "lilliput.wheels": "fetches files that are named by their sha256",
    "tasks.layout": "paths",
    "tasks.process": "locks, deadlines and messages of a process",
    "tasks.records": "reads what other stages wrote",
    "tasks.teachers": "fetches a pinned teacher, which the candidate's setting names",
    "tasks.registry": "MLflow: stages that write there are run again whenever a record changed",
}
# Modules in an exempt package that decide what a stage writes.
DECIDES = {"tasks.registry.candidates", "tasks.registry.past_champion"}
STRATEGIES = set(StrategiesConfig.model_fields)
TARGETS = {get_args(form.model_fields["target"].annotation)[0] for form in (GgufTarget, OnnxTarget, AutogptqTarget)}
# Stages with code of their own for each strategy or target: `${item.apply}` and `${item.target}` in dvc.yaml.
CHOSEN = {"compress": ("lilliput.compress", STRATEGIES), "compile": ("lilliput.compile", TARGETS)}


@cache
def imports() -> grimp.ImportGraph:
    sys.path.insert(0, str(PROJECT))
    try:
        return grimp.build_graph("lilliput", "tasks", cache_dir=None)
    finally:
        sys.path.remove(str(PROJECT))


def exempt(module: str) -> bool:
    return module not in DECIDES and any(module == name or module.startswith(f"{name}.") for name in EXEMPT)


def closure(start: str, without: frozenset[str] = frozenset()) -> set[str]:
    """`start` and all that it imports, directly or not, except what is exempt and `without`."""
    found, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module not in found and module not in without and not exempt(module):
            found.add(module)
            waiting += imports().find_modules_directly_imported_by(module)
    return found


def path_of(module: str) -> str:
    place = Path(*module.split("."))
    return str(place / "__init__.py" if (PROJECT / place).is_dir() else place.with_suffix(".py"))


def module_of(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def imported_by(stage: str, choice: str | None = None) -> set[str]:
    """The files that a process of `stage` may import, for one strategy or target."""
    package, choices = CHOSEN.get(stage, ("", set[str]()))
    modules = closure(f"tasks.{stage}", without=frozenset(f"{package}.{name}" for name in choices))
    if choice:
        modules |= closure(f"{package}.{choice}")
    return {path_of(module) for module in modules if not path_of(module).endswith("__init__.py")}


@cache
def stages() -> dict[str, list[str]]:
    """By stage's name its dependencies on code, as dvc.yaml has them."""
    graph = YAML(typ="safe").load((PROJECT / "dvc.yaml").read_text())["stages"]
    return {
        name: [dep for dep in stage.get("do", stage)["deps"] if dep.startswith(("lilliput", "tasks"))]
        for name, stage in graph.items()
    }


def cases() -> list[tuple[str, str | None]]:
    return [(stage, choice) for stage in stages() for choice in sorted(CHOSEN.get(stage, ("", {None}))[1], key=str)]


def named_by(stage: str, choice: str | None) -> set[str]:
    """The files that dvc.yaml names for `stage` with one strategy or target."""
    names = [
        dep.replace("${item.apply}", str(choice)).replace("${item.target}", str(choice)) for dep in stages()[stage]
    ]
    return {path for name in names for path in files_under(name)}


def files_under(dependency: str) -> Iterator[str]:
    place = PROJECT / dependency
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if path.is_file() and "__pycache__" not in path.parts and path.name != "__init__.py":
            yield str(path.relative_to(PROJECT))


@pytest.mark.parametrize(("stage", "choice"), cases())
def test_a_stage_depends_on_all_the_code_that_it_imports(stage, choice):
    missing = imported_by(stage, choice) - named_by(stage, choice)
    assert not missing, f"add to the deps of `{stage}` in dvc.yaml: {', '.join(sorted(missing))}"


@pytest.mark.parametrize("stage", stages())
def test_a_stage_depends_on_no_code_that_none_of_its_strategies_or_targets_imports(stage):
    choices = [choice for name, choice in cases() if name == stage]
    named = set().union(*(named_by(stage, choice) for choice in choices))
    imported = set().union(*(imported_by(stage, choice) for choice in choices))
    extra = [path for path in named - imported if path.endswith(".py") and not exempt(module_of(path))]
    assert not extra, f"remove from the deps of `{stage}` in dvc.yaml, or move out of the folder: {sorted(extra)}"


def test_every_exception_is_imported_by_a_stage():
    starts = {f"tasks.{stage}" for stage in stages()}
    starts |= {f"{package}.{choice}" for package, choices in CHOSEN.values() for choice in choices}
    everything = {module for start in starts for module in grimp_upstream(start)}
    assert not [name for name in EXEMPT if not any(m == name or m.startswith(f"{name}.") for m in everything)]
    assert everything >= DECIDES


def grimp_upstream(module: str) -> set[str]:
    return {module, *imports().find_upstream_modules(module)}


def test_every_strategy_and_target_has_its_file():
    for package, choices in CHOSEN.values():
        assert all((PROJECT / path_of(f"{package}.{choice}")).exists() for choice in choices)
