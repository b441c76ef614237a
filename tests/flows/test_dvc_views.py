"""What `dvc metrics`, `dvc plots` and `dvc dag` show, and that DVC's run cache keeps what `dvc repro` made."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from dvc.repo import Repo

from tests.flows.conftest import PROJECT

pytestmark = pytest.mark.filterwarnings("default")  # DVC and pygtrie emit warnings about each other
PIPELINE = """\
stages:
  make:
    cmd: cp input model && cp input record.json
    deps: [input]
    outs: [model]
    plots:
      - record.json: {cache: false}
"""


@pytest.fixture(scope="module")
def stages():
    repo = Repo(str(PROJECT))
    yield repo.index.stages
    repo.close()


def test_the_only_metric_is_the_summary(stages):
    assert [out.def_path for stage in stages for out in stage.outs if out.metric] == ["summary"]


def test_no_record_keeps_its_stage_out_of_the_run_cache(stages):
    """DVC's own condition, in `Stage.run`; stages that write to MLflow are never restored (`persist`)."""
    left_out = {
        stage.name.partition("@")[0]
        for stage in stages
        if any(not out.use_cache and not out.metric and not out.plot for out in stage.outs)
    }
    assert left_out == {"register", "promote", "log"}


def test_dvc_repro_restores_a_record_from_its_run_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Repo.init(str(tmp_path), no_scm=True).close()
    Path("dvc.yaml").write_text(PIPELINE)
    Path("input").write_text('{"accuracy": 1}')
    for accuracy in (1, 2, 1):
        if accuracy == 1 and Path("record.json").exists():
            monkeypatch.setenv("PATH", str(tmp_path))  # no `cp`: the stage cannot run again
        Path("input").write_text(f'{{"accuracy": {accuracy}}}')
        with closing(Repo(str(tmp_path))) as repo:
            repo.reproduce()
    assert Path("record.json").read_text() == Path("model").read_text() == '{"accuracy": 1}'


def test_the_documents_have_the_graph_of_the_stages():
    command = [sys.executable, "-m", "dvc", "dag", "--mermaid"]
    shown = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    documented = (PROJECT / "docs" / "code.md").read_text(encoding="utf-8").partition("```mermaid\n")[2]
    assert documented.partition("```")[0].split() == shown.split()


def test_the_page_of_plots_needs_no_network():
    assert "{scripts}" not in (PROJECT / ".dvc" / "plots.html").read_text(encoding="utf-8")
