import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.config import PromotionConfig
from lilliput.evaluate.compare import Comparison
from lilliput.evaluate.intervals import Estimate
from lilliput.promote import decide

RULES = PromotionConfig(prefer="accuracy", max_accuracy_drop=0.02, max_hallucination_rise=0.02)


def record(accuracy=0.5, hallucination=0.5, energy=5.0, size=100, fits=True, source="rapl"):
    def estimate(value):
        return {"value": value, "low": value, "high": value, "n": 100}

    return {
        "accuracy_choice": estimate(accuracy),
        "hallucination_rate": estimate(hallucination),
        "energy_per_query_j": estimate(energy) | {"source": source},
        "size_bytes": size,
        "fits": {"phone": fits},
    }


def champion(records, rules=RULES, against_base=None):
    return decide("phone", rules, records, against_base or {}).champion


def test_best_accuracy_wins_and_every_loser_is_told_why():
    decision = decide("phone", RULES, {"a": record(0.5, size=90), "b": record(0.7, size=100)}, {})
    assert decision.champion == "b"
    assert decision.refused.keys() == {"a"}
    assert "prefers accuracy, where b is ahead" in decision.refused["a"]


def test_what_does_not_fit_is_out_however_good():
    assert champion({"a": record(0.9, fits=False), "b": record(0.1)}) == "b"
    assert champion({"a": record(0.9, fits=False)}) is None


def test_the_interval_of_the_paired_difference_decides_not_its_mean():
    def difference(low, high):
        return {"accuracy_choice": Comparison(Estimate((low + high) / 2, low, high, 100), 0.5, 0.1)}

    records = {"base": record(0.5), "a": record(0.6)}
    assert champion(records, against_base={"a": difference(-0.01, 0.21)}) == "a"
    assert champion(records, against_base={"a": difference(-0.03, 0.23)}) == "base"


def test_more_hallucination_than_allowed_is_refused_with_the_figures():
    rise = {"a": {"hallucination_rate": Comparison(Estimate(0.05, 0.0, 0.1, 100), 0.5, 0.1)}}
    decision = decide("phone", RULES, {"base": record(0.5), "a": record(0.9)}, rise)
    assert decision.champion == "base"
    assert "0.100 above the base's" in decision.refused["a"]


def test_an_unavailable_metric_never_wins():
    rules = RULES.model_copy(update={"prefer": "energy"})
    assert champion({"a": record(energy=None), "b": record(energy=9.0)}, rules) == "b"
    assert champion({"a": record(energy=None)}, rules) is None


def test_energies_of_different_meters_are_not_compared():
    measured, estimated = record(energy=9.0, source="rapl"), record(energy=1.0, source="estimate_tdp")
    decision = decide("phone", RULES, {"a": measured, "b": estimated}, {})
    assert not any("dominated" in reason for reason in decision.refused.values())


shares = st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9])
a_record = st.builds(
    record,
    accuracy=shares,
    hallucination=shares,
    energy=st.sampled_from([1.0, 2.0, 3.0]),
    size=st.sampled_from([80, 90, 99]),
)
pools = st.dictionaries(st.sampled_from("abcdef"), a_record, min_size=1)
preferences = st.sampled_from(["accuracy", "hallucination", "energy", "size"])


@given(pools, preferences)
def test_adding_a_dominated_candidate_never_changes_the_winner(records, prefer):
    rules = RULES.model_copy(update={"prefer": prefer})
    winner = champion(records, rules)
    best = records[winner]
    worse = record(
        best["accuracy_choice"]["value"] - 0.05,
        best["hallucination_rate"]["value"] + 0.05,
        best["energy_per_query_j"]["value"] + 1,
        best["size_bytes"] + 1,
    )
    assert champion(records | {"zz": worse}, rules) == winner


@given(pools, preferences, st.sampled_from(["accuracy", "hallucination", "energy", "size"]))
def test_improving_one_metric_of_the_winner_never_demotes_it(records, prefer, improved):
    rules = RULES.model_copy(update={"prefer": prefer})
    winner = champion(records, rules)
    old = records[winner]
    values = {
        "accuracy": old["accuracy_choice"]["value"],
        "hallucination": old["hallucination_rate"]["value"],
        "energy": old["energy_per_query_j"]["value"],
        "size": old["size_bytes"],
    }
    values[improved] += {"accuracy": 0.05, "hallucination": -0.05, "energy": -0.5, "size": -1}[improved]
    assert champion(records | {winner: record(**values)}, rules) == winner


@given(pools, preferences)
def test_the_winner_is_on_the_front_and_everyone_else_has_a_reason(records, prefer):
    decision = decide("phone", RULES.model_copy(update={"prefer": prefer}), records, {})
    assert decision.champion is not None
    assert decision.refused.keys() == records.keys() - {decision.champion}
    assert all(decision.refused.values())


@pytest.mark.parametrize("prefer", ["accuracy", "hallucination", "energy", "size"])
def test_preference_picks_from_the_front(prefer):
    records = {
        "accuracy": record(0.9, 0.9, 3.0, 99),
        "hallucination": record(0.1, 0.1, 3.0, 99),
        "energy": record(0.1, 0.9, 1.0, 99),
        "size": record(0.1, 0.9, 3.0, 80),
    }
    assert champion(records, RULES.model_copy(update={"prefer": prefer})) == prefer


def test_what_the_device_cannot_run_is_out_with_the_reason_given():
    records = {"a": record(0.9), "b": record(0.1)}
    decision = decide("phone", RULES, records, {}, {"a": "not compiled for gguf, which phone runs"})
    assert decision.champion == "b"
    assert decision.refused["a"] == "not compiled for gguf, which phone runs"


def test_a_device_run_that_did_not_fit_gives_its_own_reason():
    misfit = record(0.9, fits=False) | {"does_not_fit": "killed at 487 MiB, 400 MiB are allowed"}
    assert decide("phone", RULES, {"a": misfit}, {}).refused["a"] == "killed at 487 MiB, 400 MiB are allowed"
