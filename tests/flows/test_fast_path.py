import pytest

from flows.engine import fast_path as idle


@pytest.fixture
def never_asked(monkeypatch):
    def open_workspace(_):
        raise AssertionError("DVC was asked")

    monkeypatch.setattr(idle, "open_workspace", open_workspace)


@pytest.mark.parametrize("arguments", [["--only", "gptq"], ["--plan"], ["--help"], ["--share-machine"], ["--params"]])
def test_whoever_asks_for_more_gets_the_flow(never_asked, arguments):
    assert not idle.answered(arguments, {})


def test_where_prefect_has_a_server_every_run_is_a_flow_run(never_asked):
    assert not idle.answered([], {"PREFECT_API_URL": "http://127.0.0.1:4200/api"})


def test_what_is_wrong_is_left_for_the_flow_to_say(tmp_path):
    assert not idle.answered(["--params", str(tmp_path / "missing.yaml")], {})
