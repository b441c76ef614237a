import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.config import PromotionConfig
from lilliput.promote import Reference, decide
from lilliput.records import Estimate
from lilliput.statistics.differences import Comparison
from tests import results

RULES = PromotionConfig(prefer="accuracy", max_accuracy_drop=0.02, max_hallucination_rise=0.02)


def record(accuracy=0.5, hallucination=0.5, energy=5.0, size=100, fits=True, source="rapl", **others):
    return results.evaluation(
        accuracy_choice=results.figure(accuracy),
        hallucination_rate=results.figure(hallucination),
        energy_per_query_j=results.energy(energy, source),
        size_bytes=size,
        fits={"phone": fits},
        **others,
    )


def estimated(value, low=None, high=None):
    return Comparison(Estimate(value, value if low is None else low, value if high is None else high, 100), 0.5, 0.1)


def compared(reference, records):
    """How `records` differ from `reference` if every question gave the same: intervals of no width."""
    metrics = ("accuracy_choice", "hallucination_rate", "energy_per_query_j")
    return {
        name: {
            metric: estimated(own.number(metric) - reference.number(metric))
            for metric in metrics
            if None not in (own.number(metric), reference.number(metric))
            and (metric != "energy_per_query_j" or own.energy_per_query_j.source == reference.energy_per_query_j.source)
        }
        for name, own in records.items()
    }


def base(differences=None, **values):
    return Reference("base", "the base", record(**{"accuracy": 0.0, "hallucination": 1.0} | values), differences or {})


def decision(records, rules=RULES, against_base=None, reigning=None, impossible=None):
    held_against = base(compared(base().record, records) if against_base is None else against_base)
    champion_so_far = reigning and Reference(
        reigning, reigning, records[reigning], compared(records[reigning], records)
    )
    return decide("phone", rules, records, held_against, impossible, champion_so_far)


def champion(records, rules=RULES, against_base=None, reigning=None):
    return decision(records, rules, against_base, reigning).champion


def test_best_accuracy_wins_and_all_others_have_a_reason():
    decided = decision({"a": record(0.5, size=90), "b": record(0.7, size=100)})
    assert (decided.champion, decided.challenger) == ("b", "a")
    assert decided.refused.keys() == {"a"}
    assert "b is ahead in accuracy, which decides" in decided.refused["a"]


def test_a_candidate_that_does_not_fit_is_refused_at_any_accuracy():
    assert champion({"a": record(0.9, fits=False), "b": record(0.1)}) == "b"
    assert champion({"a": record(0.9, fits=False)}) is None


@pytest.mark.parametrize("metric", ["accuracy_choice", "hallucination_rate", "energy_per_query_j"])
def test_the_interval_of_the_paired_difference_decides_not_its_mean(metric):
    records, rules = {"base": record(0.5), "a": record(0.6)}, RULES.model_copy(update={"max_energy_rise": 0.02 / 5.0})
    sign = 1 if metric == "accuracy_choice" else -1
    even = {key: estimated(0.0) for key in ("accuracy_choice", "hallucination_rate", "energy_per_query_j")}

    def against(worst):
        low, high = sorted([sign * worst, sign * 0.2])
        return {"a": even | {metric: estimated(sign * 0.1, low, high)}}

    assert champion(records, rules, against(-0.01)) == "a"
    refused = decision(records, rules, against(-0.03))
    assert refused.champion == "base"
    assert "0.030" in refused.refused["a"]
    assert "0.020 is allowed" in refused.refused["a"]


def test_a_less_accessible_one_is_refused_by_both_intervals_at_their_worst():
    def accessible(value):
        return {"accessibility": results.figure(value, 0.01)}

    rules = RULES.model_copy(update={"max_accessibility_drop": 0.1})
    unknown = {"accessibility": results.figure(None)}
    records = {"a": record(0.6, **accessible(0.72)), "b": record(0.5, **accessible(0.73)), "c": record(0.9, **unknown)}
    even = {name: {"accuracy_choice": estimated(0.0), "hallucination_rate": estimated(0.0)} for name in records}
    held_against = Reference("base", "the base", record(**accessible(0.8)), even)
    decided = decide("phone", rules, records, held_against)
    assert decided.champion == "b"
    assert "0.100 is allowed" in decided.refused["a"]
    assert "unavailable" in decided.refused["c"]


def test_a_candidate_without_comparison_to_the_base_is_refused():
    decided = decision({"base": record(0.5), "a": record(0.9)}, against_base={})
    assert decided.champion == "base"
    assert "cannot be compared with that of the base" in decided.refused["a"]


def test_an_unavailable_metric_never_wins():
    rules = RULES.model_copy(update={"prefer": "energy"})
    assert champion({"a": record(energy=None), "b": record(energy=9.0)}, rules) == "b"
    assert champion({"a": record(energy=None)}, rules) is None


def test_energies_of_different_meters_are_not_compared():
    measured, guessed = record(energy=9.0, source="rapl"), record(energy=1.0, source="estimate_tdp")
    decided = decision({"a": measured, "b": guessed})
    assert not any("dominated" in reason for reason in decided.refused.values())


def test_the_champion_so_far_keeps_out_who_falls_too_far_behind_it():
    rules = RULES.model_copy(update={"prefer": "size"})
    records = {"small": record(0.7, size=80), "large": record(0.8, size=99), "middle": record(0.79, size=90)}
    decided = decision(records, rules, reigning="large")
    assert decided.champion == "middle"  # 0.01 below the champion; small is 0.1 below it
    assert decided.challenger == "small"  # which rules and preference would have, were it not for the champion
    assert "choice accuracy may lie 0.100 below that of large" in decided.refused["small"]


def test_a_current_champion_that_is_refused_refuses_no_others():
    rules = RULES.model_copy(update={"prefer": "size"})
    records = {"small": record(0.7, size=80), "large": record(0.9, size=99, fits=False)}
    assert champion(records, rules, reigning="large") == "small"


def test_the_same_decision_again_gives_the_same_reasons():
    records = {"a": record(0.5, size=90), "b": record(0.7, size=100), "c": record(0.4, size=80)}
    first = decision(records)
    assert decision(records, reigning=first.champion) == first


def without_choices(accuracy, hallucination=0.5, size=100):
    return record(None, hallucination, size=size).model_copy(update={"accuracy_free": results.figure(accuracy)})


EVEN = {key: estimated(0.0) for key in ("accuracy_free", "hallucination_rate", "energy_per_query_j")}


def decided_against(reference, records, differences, rules=RULES):
    return decide("phone", rules, records, Reference("base", "the base", reference, differences))


def test_accuracy_is_that_of_free_answers_where_no_question_has_choices():
    records = {"a": without_choices(0.5, size=90), "b": without_choices(0.7)}
    differences = {"a": EVEN | {"accuracy_free": estimated(-0.1)}, "b": EVEN}
    decided = decided_against(without_choices(0.6), records, differences)
    assert decided.champion == "b" and "best accuracy (0.700)" in decided.reason
    assert decided.refused["a"].startswith("free accuracy may lie 0.100 below that of the base")


def test_a_missing_hallucination_rate_is_never_good():
    records = {"known": without_choices(0.5, 0.9), "unknown": without_choices(0.5, None)}
    differences = {"known": EVEN, "unknown": {"accuracy_free": estimated(0.0)}}
    decided = decided_against(without_choices(0.5), records, differences)
    assert decided.champion == "known"
    assert "hallucination rate cannot be compared" in decided.refused["unknown"]
    rules = RULES.model_copy(update={"prefer": "hallucination", "max_hallucination_rise": 1.0})
    preferring = decided_against(without_choices(0.5), records, dict.fromkeys(records, EVEN), rules)
    assert preferring.champion == "known" and "unavailable" in preferring.refused["unknown"]
    dominated = decided_against(without_choices(0.5), records, dict.fromkeys(records, EVEN))
    assert "dominated by known" in dominated.refused["unknown"]


def test_without_any_hallucination_rate_accuracy_decides():
    records = {"a": without_choices(0.5, None), "b": without_choices(0.7, None)}
    assert decided_against(without_choices(0.5, None), records, dict.fromkeys(records, EVEN)).champion == "b"


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


@st.composite
def situations(draw):
    """A pool, a preference, and perhaps one of the pool as champion so far."""
    records = draw(pools)
    rules = RULES.model_copy(
        update={"prefer": draw(preferences), "max_energy_rise": draw(st.sampled_from([None, 0.5]))}
    )
    return records, rules, draw(st.sampled_from([None, *records]))


def improved(old, metric):
    values = {
        "accuracy": old.accuracy_choice.value,
        "hallucination": old.hallucination_rate.value,
        "energy": old.energy_per_query_j.value,
        "size": old.size_bytes,
    }
    values[metric] += {"accuracy": 0.05, "hallucination": -0.05, "energy": -0.5, "size": -1}[metric]
    return record(**values)


@given(situations())
def test_adding_a_dominated_candidate_never_changes_the_winner(situation):
    records, rules, reigning = situation
    winner = champion(records, rules, reigning=reigning)
    best = records[winner]
    worse = record(
        best.accuracy_choice.value - 0.05,
        best.hallucination_rate.value + 0.05,
        best.energy_per_query_j.value + 1,
        best.size_bytes + 1,
    )
    assert champion(records | {"zz": worse}, rules, reigning=reigning) == winner


@given(situations(), st.sampled_from(["accuracy", "hallucination", "energy", "size"]))
def test_improving_one_metric_of_the_winner_never_demotes_it(situation, metric):
    records, rules, reigning = situation
    winner = champion(records, rules, reigning=reigning)
    better = records | {winner: improved(records[winner], metric)}
    assert champion(better, rules, reigning=reigning) == winner


@given(situations())
def test_the_winner_is_within_the_limits_and_everyone_else_has_a_reason(situation):
    records, rules, reigning = situation
    decided = decision(records, rules, reigning=reigning)
    assert decided.champion is not None
    assert decided.refused.keys() == records.keys() - {decided.champion}
    assert all(decided.refused.values())
    assert decided.challenger in {None, *decided.refused}
    if reigning:
        won, so_far = records[decided.champion], records[reigning]
        assert won.accuracy_choice.value >= so_far.accuracy_choice.value - 0.02 - 1e-9
        assert won.hallucination_rate.value <= so_far.hallucination_rate.value + 0.02 + 1e-9


@pytest.mark.parametrize("prefer", ["accuracy", "hallucination", "energy", "size"])
def test_preference_picks_from_the_front(prefer):
    records = {
        "accuracy": record(0.9, 0.9, 3.0, 99),
        "hallucination": record(0.1, 0.1, 3.0, 99),
        "energy": record(0.1, 0.9, 1.0, 99),
        "size": record(0.1, 0.9, 3.0, 80),
    }
    assert champion(records, RULES.model_copy(update={"prefer": prefer})) == prefer


def test_a_candidate_that_the_device_cannot_run_keeps_its_given_reason():
    records = {"a": record(0.9), "b": record(0.1)}
    decided = decision(records, impossible={"a": "not compiled for gguf, which phone runs"})
    assert decided.champion == "b"
    assert decided.refused["a"] == "not compiled for gguf, which phone runs"


def test_a_device_run_that_did_not_fit_gives_its_own_reason():
    misfit = record(0.9, fits=False, does_not_fit="killed at 487 MiB, 400 MiB are allowed")
    assert decision({"a": misfit}).refused["a"] == "killed at 487 MiB, 400 MiB are allowed"
