"""Records: the repository's own files and generated ones come back with the same bytes; damage is one message."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lilliput.artifacts import find_record, parse_record, read_record, write_json
from lilliput.errors import ArtifactError
from lilliput.records import (
    CompressCost,
    Cost,
    CurvePoint,
    Curves,
    Decision,
    DeviceRecord,
    DeviceRun,
    Difference,
    Divergence,
    Energy,
    Estimate,
    EvaluationRecord,
    Figure,
    OffloadRecord,
    ParityRecord,
    Perplexity,
    PolicyFigures,
    Promotion,
    Promotions,
    Quantiles,
    Record,
    Registry,
    TrialRecord,
    number_of,
)
from tests import results

PROJECT = Path(__file__).resolve().parents[1]
RECORDED = {
    "metrics/*.json": EvaluationRecord,
    "metrics/devices/*.json": DeviceRecord,
    "offload/*.json": OffloadRecord,
    "costs/*.json": CompressCost,
}
PARITY = """{
  "candidate": "pocket",
  "target": "gguf",
  "positions": 255,
  "same_argmax": {"value": 0.95, "low": 0.91, "high": 0.97, "n": 255},
  "same_argmax_clear": {"value": 1.0, "low": 0.98, "high": 1.0, "n": 191},
  "mean_difference_nats": 0.009,
  "mean_absolute_difference_nats": 0.078,
  "questions": 60,
  "same_choices": {"value": 0.97, "low": 0.89, "high": 0.99, "n": 60},
  "accuracy_difference": {"value": -0.02, "low": -0.09, "high": 0.04, "n": 60},
  "accuracy_differs": false,
  "runtime": {"engine": "xllamacpp", "threads": "1"},
  "limits": {"tokens": 256, "questions": 60, "clear_nats": 0.5, "deadline_s": 300.0}
}"""
DECISION = {
    "device": "board",
    "champion": None,
    "challenger": None,
    "reason": "no candidate",
    "refused": {"a": "large"},
}
PROMOTION = {
    "board": DECISION | {"compiled": None},
    "phone": DECISION | {"compiled": {"name": "a-gguf", "sha256": "f"}},
}


def recorded():
    return [(path, kind) for pattern, kind in RECORDED.items() for path in sorted(PROJECT.glob(pattern))]


@pytest.mark.parametrize(
    ("path", "kind"), recorded(), ids=lambda value: getattr(value, "stem", value.__class__.__name__)
)
def test_a_recorded_file_comes_back_with_the_same_bytes(path, kind, tmp_path):
    write_json(tmp_path / path.name, read_record(kind, path))
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (ParityRecord, json.loads(PARITY)),
        (Promotions, PROMOTION),
        (Registry, {"base": {"version": "1", "run_id": "8d"}}),
        (Curves, {"threshold": [{"offloaded": 0.0, "accuracy": 0.25, "hallucination_rate": 0.5}]}),
    ],
)
def test_files_that_git_does_not_hold_come_back_in_the_same_order(kind, content, tmp_path):
    write_json(tmp_path / "a.json", content)
    write_json(tmp_path / "b.json", read_record(kind, tmp_path / "a.json"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
GENERATED = (
    Figure,
    Energy,
    Difference,
    Divergence,
    Quantiles,
    Perplexity,
    Cost,
    CurvePoint,
    Decision,
    PolicyFigures,
    DeviceRun,
    TrialRecord,
)


@pytest.mark.parametrize("kind", GENERATED)
@given(data=st.data())
def test_generated_records_come_back_equal_and_in_order(kind, data):
    st.register_type_strategy(float, FLOATS)
    record = data.draw(st.builds(kind))
    content = json.dumps(record.as_json(), allow_nan=False)
    again = parse_record(kind, content, "a.json")
    assert json.dumps(again.as_json()) == content
    assert list(record.as_json()) == [name for name in kind.model_fields if name in record.model_fields_set]


def test_every_record_is_frozen_and_rejects_unknown_fields_and_other_types():
    figure = results.figure(0.5)
    with pytest.raises(ValidationError, match="frozen"):
        figure.value = 1.0
    for wrong in ({"vlaue": 1.0}, {"value": "0.5"}, {"value": float("nan")}, {"n": 1.5}):
        with pytest.raises(ValidationError):
            Figure(**{"value": 0.5, "low": 0.4, "high": 0.6, "n": 3} | wrong)


def test_a_figure_without_observations_is_written_with_all_keys():
    assert Figure.of(None).as_json() == {"value": None, "low": None, "high": None, "n": 0}
    estimate = Estimate(0.5, 0.25, 0.75, 3)
    energy = Energy.of(estimate, source="rapl", measured=True, idle_watts=None)
    assert list(energy.as_json()) == ["value", "low", "high", "n", "source", "measured", "idle_watts"]
    assert Energy.of(estimate, source="declared", measured=False).as_json().keys() == energy.as_json().keys() - {
        "idle_watts"
    }


def test_a_result_is_a_number_whatever_its_form():
    times = Quantiles(p50=2.0, p90=3.0, n=4)
    assert [number_of(result) for result in (results.figure(0.5), times, 7, None)] == [0.5, 2.0, 7, None]
    assert results.evaluation(size_bytes=9).number("size_bytes") == 9
    assert results.evaluation(perplexity=None).number("perplexity") is None


def test_a_trial_keeps_the_form_of_each_result():
    figures = {
        "accuracy_choice": results.figure(0.5),
        "energy_per_query_j": results.energy(2.0),
        "perplexity": Perplexity(value=3.0, n=2, tokens=4),
        "size_bytes": 7,
        "accessibility": None,
    }
    trial = TrialRecord(candidate="a", chain="lora", figures=figures)
    assert parse_record(TrialRecord, json.dumps(trial.as_json()), "search.json").figures == figures


def test_a_record_of_an_older_version_is_read_where_its_meaning_is_clear(tmp_path):
    content = results.evaluation().as_json()
    for key in ("benchmarks", "perplexity", "empty_answers", "contaminated_questions"):
        del content[key]
    write_json(tmp_path / "a.json", content)
    record = read_record(EvaluationRecord, tmp_path / "a.json")
    assert (record.benchmarks, record.perplexity, record.empty_answers) == ({}, None, None)
    assert record.as_json() == content


def test_unknown_keys_are_ignored_at_every_level():
    content = results.evaluation().as_json() | {"from_a_newer_version": 1}
    content["accuracy_choice"]["note"] = "likewise"
    assert parse_record(EvaluationRecord, json.dumps(content), "a.json") == results.evaluation()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.pop("accuracy_choice"), "accuracy_choice: Field required"),
        (lambda content: content["accuracy_choice"].pop("value"), "accuracy_choice.value: Field required"),
        (
            lambda content: content["energy_per_query_j"].update(source="guess"),
            "energy_per_query_j.source: Input should",
        ),
        (lambda content: content.update(size_bytes="large"), "size_bytes: Input should be a valid integer"),
    ],
)
def test_a_damaged_record_names_file_field_and_remedy(damage, message, tmp_path):
    content = results.evaluation().as_json()
    damage(content)
    path = tmp_path / "base.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError) as caught:
        read_record(EvaluationRecord, path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert str(caught.value).endswith("; delete this file and run `dvc repro`, which writes it again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"candidate": NaN}'])
def test_content_that_is_no_record_is_an_artifact_error(content, tmp_path):
    (tmp_path / "base.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"base\.json: "):
        read_record(EvaluationRecord, tmp_path / "base.json")


def test_a_missing_file_is_none_or_an_error_that_says_what_writes_it(tmp_path):
    assert find_record(EvaluationRecord, tmp_path / "base.json") is None
    with pytest.raises(ArtifactError, match=r"base\.json: no such file; run `dvc repro`, which writes it"):
        read_record(EvaluationRecord, tmp_path / "base.json")


def test_a_promotion_is_written_with_all_keys_of_its_decision():
    decision = Decision(device="board", champion=None, reason="no candidate", refused={"a": "large"})
    assert Promotion(**dict(decision), compiled=None).as_json() == PROMOTION["board"]


def test_every_record_with_a_cost_can_be_read_as_one():
    cost = parse_record(Cost, json.dumps(results.evaluation().as_json()), "metrics/a.json")
    assert (cost.seconds, cost.cpu_seconds, cost.peak_rss_bytes) == (60.0, 90.0, 2**30)
    assert isinstance(cost, Record)
