"""compose.yaml as far as it can be checked without Docker: closed to others, pinned, watched, and without a secret."""

from __future__ import annotations

import re

import pytest
from ruamel.yaml import YAML

from tests.conftest import PROJECT

COMPOSE = YAML(typ="safe", pure=True).load((PROJECT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
LOCKED = (PROJECT / "requirements.lock").read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_listens_on_loopback_alone_and_says_whether_it_is_well(name):
    service = SERVICES[name]
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d+\.\d+[\w.-]*", service["image"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    waits = service.get("restart") == "unless-stopped"
    assert ("healthcheck" in service) == waits  # the other one ends by itself
    for other, on in service.get("depends_on", {}).items():
        healthy = "healthcheck" in SERVICES[other]
        assert on["condition"] == ("service_healthy" if healthy else "service_completed_successfully")


def test_every_password_has_to_be_set_outside_the_file():
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|KEY", name):
                assert re.fullmatch(r"\$\{\w+:\?.*\}", value), name
    assert "://lilliput@" in (PROJECT / "compose.yaml").read_text()  # a user, and no password after it
    assert not re.search(r"://\w+:\w+@", (PROJECT / "compose.yaml").read_text())


@pytest.mark.parametrize(("name", "package"), [("mlflow", "mlflow"), ("prefect", "prefect")])
def test_servers_are_of_the_version_their_clients_are_locked_to(name, package):
    locked = re.search(rf"^{package}==(\S+)$", LOCKED, re.MULTILINE)
    assert locked and re.search(rf":v?{re.escape(locked[1])}-", SERVICES[name]["image"])


def test_its_volumes_and_configs_are_declared():
    for service in SERVICES.values():
        assert {volume.partition(":")[0] for volume in service.get("volumes", [])} <= COMPOSE["volumes"].keys()
        assert {config["source"] for config in service.get("configs", [])} <= COMPOSE["configs"].keys()
