import pytest

from flows.engine import fast_path


@pytest.fixture
def without_dvc(monkeypatch):
    def open_workspace(_):
        raise AssertionError("the fast path opened the workspace")

    monkeypatch.setattr(fast_path, "open_workspace", open_workspace)


@pytest.mark.parametrize("arguments", [["--only", "gptq"], ["--plan"], ["--help"], ["--share-machine"], ["--params"]])
def test_other_options_run_the_flow(without_dvc, arguments):
    assert not fast_path.try_fast_path(arguments, {})


def test_a_configured_prefect_server_runs_the_flow(without_dvc):
    assert not fast_path.try_fast_path([], {"PREFECT_API_URL": "http://127.0.0.1:4200/api"})


def test_errors_are_left_to_the_flow(tmp_path):
    assert not fast_path.try_fast_path(["--params", str(tmp_path / "missing.yaml")], {})
