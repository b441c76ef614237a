"""Versions and aliases in an embedded store."""

from __future__ import annotations

import pytest

from tasks.registry import get_or_create, model_versions

pytestmark = pytest.mark.filterwarnings("default")  # MLflow emits warnings about its own code


def test_the_model_is_created_once_and_aliases_of_removed_devices_are_deleted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = model_versions.client()
    for _ in range(2):
        get_or_create.ensure_model(client)
    versions = [client.create_model_version(model_versions.MODEL, source="file:///nowhere").version for _ in range(3)]
    for device, version in zip(("phone", "board"), versions, strict=False):
        model_versions.move_champion(device, str(version))
    client.set_registered_model_alias(model_versions.MODEL, "by-hand", str(versions[2]))
    model_versions.forget_devices(["phone"])
    aliases = {name: model_versions.version_of(name) for name in ("champion-phone", "champion-board", "by-hand")}
    assert [found and int(found.version) for found in aliases.values()] == [1, None, 3]
