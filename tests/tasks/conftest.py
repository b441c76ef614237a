"""A project with two candidates in a temporary folder, for stages that run without DVC."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lilliput.data.questions import write_questions

PROJECT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def project(checkpoint, facts, tmp_path_factory) -> Path:
    """A folder with parameters and questions, before any stage has run."""
    folder = tmp_path_factory.mktemp("killed")
    raw = yaml.safe_load((PROJECT / "examples" / "tiny.yaml").read_text())
    raw["source"] = {"model": f"path:{checkpoint}"}
    raw["data"] |= {"source": "facts.jsonl", "train_share": 0.5}
    raw["strategies"]["load"]["rehearsal"] = None
    raw["candidates"] = {"base": {"from": "source", "apply": "load"}, "lora": {"from": "base", "apply": "lora"}}
    raw |= {"compile": {}, "serving": {}}
    raw["caching"]["candidates"] = []
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    write_questions(folder / "facts.jsonl", facts)
    return folder
