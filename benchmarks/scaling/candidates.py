"""Candidates of the graph: what DVC and Prefect take of a run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.scaling.measuring import PROJECT, TINY, Counts, Row, tell, timed


def candidates(count: Counts = None) -> None:
    """DVC's and Prefect's share of a run: the graph, asking about a stage, recording one, the plan, nothing to do.

    What DVC records lies in a folder of its own: never may a real run find these outputs in the project's cache.
    """
    for number in count or [4, 16, 64]:
        with tempfile.TemporaryDirectory() as folder:
            for step in (_record, _ask, _plan, _run_cached):
                tell("candidates", {"candidates": number}, step, Path(folder), number)


def _workspace(folder: Path, count: int) -> None:
    """A workspace of `count` candidates beside the base: a sixth of them branches that the others end."""
    from ruamel.yaml import YAML

    from flows.engine.workspace import make_workspace

    yaml = YAML()
    raw = yaml.load(TINY.read_text(encoding="utf-8"))
    branches = max(1, count // 6)
    raw["candidates"] = {"base": {"from": "source", "apply": "load"}}
    raw["candidates"] |= {
        f"branch-{n}": {"from": "base", "apply": "lora", "with": {"seed": n}} for n in range(branches)
    }
    raw["candidates"] |= {
        f"end-{n}": {
            "from": f"branch-{n % branches}",
            "apply": "rtn",
            "with": {"bits": (4, 8, 3, 2)[n // branches % 4]},
        }
        for n in range(count - branches)
    }
    raw["caching"]["candidates"], raw["compile"], raw["serving"] = [], {}, {}
    params = folder / "given.yaml"
    with params.open("w", encoding="utf-8") as stream:
        yaml.dump(raw, stream)
    source = raw["data"]["source"]
    make_workspace(folder / "workspace", params, {source: PROJECT / source})
    (folder / "workspace/.dvc/config").write_text(
        "[core]\n    analytics = false\n    no_scm = true\n", encoding="utf-8"
    )


def _record(folder: Path, count: int) -> Row:
    """Leaves an output of one line for each stage and records all of them at once; not a part of any run."""
    from dvc.repo import Repo

    from flows.engine.lineage import Lineage

    _workspace(folder, count)
    with contextlib.chdir(folder / "workspace"):
        with timed() as cost:
            lineage = Lineage(Path())
        for stage in lineage.stages():
            _pretend(lineage, stage.name)
        lineage.close()
        Repo().commit(force=True)
    return cost


def _ask(folder: Path, count: int) -> Row:
    """What it takes to ask about a stage, the mean of five, and to record one, the mean of two."""
    from flows.engine.lineage import Lineage

    with contextlib.chdir(folder / "workspace"):
        lineage = Lineage(Path())
        stages = lineage.stages()
        drawn = random.Random(count).sample([stage.name for stage in stages], 5)
        with timed() as asked:
            assert not any(lineage.changes(name) for name in drawn)
        with timed() as recorded:
            for name in drawn[:2]:
                lineage.commit(name, lineage.inputs(name))
        assert not any(lineage.changes(name) for name in drawn)
    return {"stages": len(stages), "ask_cpu_s": asked["cpu_s"] / 5, "record_cpu_s": recorded["cpu_s"] / 2}


def _pretend(lineage: Any, name: str) -> None:
    for out in lineage._node(name).outs:
        place = Path(out.fs_path)
        path = place if place.suffix in {".json", ".jsonl"} else place / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"made_by": name, "seconds": 1.0, "peak_rss_bytes": 1}), encoding="utf-8")


def _plan(folder: Path, count: int) -> Row:
    del count
    from flows.engine.lineage import Lineage
    from flows.engine.plan import plan
    from lilliput.params import load_params

    with contextlib.chdir(folder / "workspace"), timed() as cost:
        planned = plan(Lineage(Path()), load_params(Path("params.yaml")), Path(), [])
    assert not any(item.reason for item in planned), [item.reason for item in planned if item.reason][:3]
    return cost | {"stages": len(planned)}


def _run_cached(folder: Path, count: int) -> Row:
    """What `flows.democratize` does with a graph that stands made, after Prefect's server has started."""
    del count
    os.environ |= {"PREFECT_LOGGING_LEVEL": "ERROR", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    from prefect import flow
    from prefect.testing.utilities import prefect_test_harness

    from flows.engine.lineage import Lineage
    from flows.engine.runners import open_runner
    from flows.engine.scheduler import run_stages

    @flow
    def cached() -> tuple[dict[str, str], dict[str, str]]:
        lineage = Lineage(Path())
        with open_runner("local", 1, Path.cwd(), share_machine=True) as stage_runner:
            return run_stages(lineage.stages(), lineage, stage_runner)

    with prefect_test_harness(server_startup_timeout=300), contextlib.chdir(folder / "workspace"), timed() as cost:
        states, failed = cached()
    assert set(states.values()) == {"Cached"} and not failed
    return cost | {"stages": len(states)}
