"""A device judges each candidate by what its compiled model answers, not by what the checkpoint answered."""

import pytest

from lilliput.artifacts import PARITY, seal, write_json
from lilliput.config import CandidateConfig, GgufTarget, PromotionConfig
from lilliput.data.jsonl import write_rows
from lilliput.promote import decide
from tasks import layout
from tasks.records import device_record
from tasks.registry.candidates import CandidatePool
from tests import results

DEVICE = "phone-4gb"
ROWS = 200


def answers(right, **timed):
    return [{"id": str(n), "choice_right": n < right, "hallucinated": n >= right} | timed for n in range(ROWS)]


def quality(right):
    share, wrong = results.figure(right / ROWS, n=ROWS), results.figure(1 - right / ROWS, n=ROWS)
    return results.quality(accuracy_choice=share, accuracy_free=share, hallucination_rate=wrong)


def evaluation(name, right):
    return results.evaluation(
        candidate=name,
        accuracy_choice=results.figure(right / ROWS, n=ROWS),
        hallucination_rate=results.figure(1 - right / ROWS, n=ROWS),
        fits={DEVICE: True},
    )


@pytest.fixture
def pool(tiny_params, tmp_path, monkeypatch):
    """Checkpoints `base` with 100 right answers and `a` and `b` with 120; compiled, `a` has 60 and `b` has 118."""
    monkeypatch.chdir(tmp_path)
    candidates = {"base": CandidateConfig.model_validate({"from": "source", "apply": "load"})}
    candidates |= {name: CandidateConfig.model_validate({"from": "base", "apply": "rtn"}) for name in ("a", "b")}
    compiled = {f"{name}-gguf": GgufTarget(candidate=name, target="gguf") for name in ("a", "b")}
    params = tiny_params.model_copy(
        update={
            "candidates": candidates,
            "compile": compiled,
            "devices": {DEVICE: tiny_params.devices[DEVICE]},
        }
    )
    for name, right in {"a": 60, "b": 118}.items():
        compile_for_test(name, right)
    checkpoints = {"base": 100, "a": 120, "b": 120}
    return CandidatePool(
        params=params,
        versions=dict.fromkeys(checkpoints, "1"),
        roles={name: {} for name in checkpoints},
        records={name: evaluation(name, right) for name, right in checkpoints.items()},
        answers={name: answers(right, energy_j=2.0) for name, right in checkpoints.items()},
        base="base",
    )


def compile_for_test(name, right):
    for folder in (layout.model(name), layout.compiled(name, "gguf")):
        folder.mkdir(parents=True)
        (folder / "weights.txt").write_text(name)
    parent = seal(layout.model(name), candidate=name, strategy="rtn", config={}, parent=None, parameters=1, facts={})
    folder = layout.compiled(name, "gguf")
    (folder / PARITY).write_text("{}")
    manifest = seal(folder, candidate=f"{name}-gguf", strategy="gguf", config={}, parent=parent, parameters=1, facts={})
    run = results.device_run(energy_per_query_j=results.energy(0.5))
    record = results.device_record({DEVICE: run}, sha256=manifest.artifact_sha256, quality=quality(right))
    write_json(layout.devices(f"{name}-gguf"), record)
    write_rows(layout.compiled_answers(f"{name}-gguf"), answers(right))


def champion(pool):
    rules = {"prefer": "accuracy", "max_accuracy_drop": 0.05, "max_hallucination_rise": 0.05}
    on_device = pool.on_device(DEVICE)
    base = pool.base_reference(on_device)
    return decide(DEVICE, PromotionConfig.model_validate(rules), on_device.records, base, on_device.impossible)


def test_records_have_the_quality_and_the_size_of_the_compiled_model(pool):
    record = pool.on_device(DEVICE).records["a"]
    assert record.accuracy_choice.value == 60 / ROWS
    assert record.hallucination_rate.value == 1 - 60 / ROWS
    assert record.size_bytes == results.device_record({}).size_bytes
    assert record.energy_per_query_j.value == 0.5
    assert pool.records["a"].accuracy_choice.value == 120 / ROWS


def test_a_candidate_that_compiling_spoilt_is_refused(pool):
    decision = champion(pool)
    assert decision.champion == "b"
    assert "choice accuracy may lie" in decision.refused["a"]


def test_differences_from_the_champion_are_those_of_the_compiled_models(pool):
    difference = pool.champion_reference("b", pool.on_device(DEVICE)).differences["a"]["accuracy_choice"].difference
    assert difference.value == pytest.approx((60 - 118) / ROWS)


def test_energies_are_paired_with_those_of_the_checkpoints(pool):
    differences = pool.base_reference(pool.on_device(DEVICE)).differences["a"]
    assert differences["energy_per_query_j"].difference.value == 0.0


def test_a_compiled_model_without_answers_cannot_win(pool):
    assert set(pool.on_device(DEVICE).impossible) == {"base"}
    older = device_record(pool.params, "b-gguf").as_json() | {"quality": None}
    write_json(layout.devices("b-gguf"), older)
    assert pool.on_device(DEVICE).impossible["b"] == "b-gguf has no recorded answers; run its stage `devices` again"
    assert champion(pool).champion is None


def test_a_device_without_target_judges_the_checkpoints(pool):
    plain = pool.params.devices[DEVICE].model_copy(update={"target": None})
    pool.params.devices[DEVICE] = plain
    assert pool.on_device(DEVICE).records == pool.records
