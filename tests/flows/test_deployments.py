"""prefect.yaml: each deployment has a name and a description of its own, and the documents name those that exist."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
import yaml

from tests.flows.conftest import PROJECT

DEPLOYMENTS = yaml.safe_load((PROJECT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]


def full_name(deployment):
    return f"{deployment['entrypoint'].rpartition(':')[2]}/{deployment['name']}"


def test_names_and_descriptions_are_distinct():
    for key in ("name", "description"):
        values = [deployment[key] for deployment in DEPLOYMENTS]
        assert len(set(values)) == len(values), key


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=full_name)
def test_parameters_are_those_of_the_flow(deployment):
    path, _, flow = deployment["entrypoint"].partition(":")
    assert path == "flows/prefect_flows.py"
    work = getattr(importlib.import_module(f"flows.{flow}"), flow)
    assert deployment["parameters"].keys() <= inspect.signature(work).parameters.keys()


def test_a_schedule_is_named_in_the_description():
    scheduled = [deployment for deployment in DEPLOYMENTS if deployment.get("schedules")]
    assert [full_name(deployment) for deployment in scheduled] == ["democratize/nightly"]
    for deployment in scheduled:
        (schedule,) = deployment["schedules"]
        minute, hour, *_ = schedule["cron"].split()
        assert f"{hour}:{minute} ({schedule['timezone']})" in deployment["description"]


def test_the_documents_name_existing_deployments():
    text = "".join(path.read_text(encoding="utf-8") for path in [PROJECT / "README.md", *PROJECT.glob("docs/**/*.md")])
    text += (PROJECT / "prefect.yaml").read_text(encoding="utf-8")
    flows = "|".join({full_name(deployment).partition("/")[0] for deployment in DEPLOYMENTS})
    named = set(re.findall(rf"(?<![\w/.])((?:{flows})/[a-z]+)(?![\w/.])", text))
    assert named == set(map(full_name, DEPLOYMENTS))
