"""The choice of the served policy on simulated questions, for which the right choice is known."""

import numpy as np
import pytest

from lilliput.config import ObjectiveConfig
from lilliput.errors import ArtifactError
from lilliput.offload.choice import ROUTING, choose_policy
from lilliput.offload.chosen import describe, require_choices, uses_edge, uses_learned
from lilliput.offload.fit import cross_fit, folds_of, held_out_worth
from lilliput.offload.fitted_router import open_router
from lilliput.offload.judge import policies
from lilliput.offload.outcomes import CostParts, Outcomes, Policy
from lilliput.offload.policy import Conditions, FixedRouter, ThresholdRouter
from lilliput.records import PolicyChoice
from tests import results

QUESTIONS = 300
# The edge server is 0.05 more accurate than the device, and slower; both are within the budget.
OBJECTIVE = ObjectiveConfig(energy_budget_j=10.0, max_accuracy_drop=0.0, max_hallucination_rise=0.0)
GROUPS = [f"entity {n // 2}" for n in range(QUESTIONS)]  # two questions about each


def outcomes_of(device, server):
    right = {"device": device.astype(float), "server": server.astype(float)}
    everything = np.ones(len(device), dtype=bool)
    return Outcomes(everything, everything, right, {place: 1.0 - values for place, values in right.items()})


def costs(device_s=0.1, remote_s=0.4, device_j=0.1, remote_j=0.2, n=QUESTIONS):
    spread = {"embed_s": 0.01, "embed_j": 0.01, "device_s": device_s, "device_j": device_j}
    spread |= {"remote_s": remote_s, "remote_j": remote_j}
    return CostParts(**{name: np.full(n, value) for name, value in spread.items()})


def by_policy(threshold, before=None, after=None, n=QUESTIONS):
    nothing = np.zeros(n)
    return {
        "device": Policy(nothing),
        "server": Policy(nothing + 1.0),
        "threshold": Policy(np.asarray(threshold, dtype=float), looks=1.0),
        "learned_before": Policy(nothing if before is None else np.asarray(before, dtype=float), embeds=1.0),
        "learned_after": Policy(nothing if after is None else np.asarray(after, dtype=float), embeds=1.0, looks=1.0),
    }


def choose(decisions, outcomes, parts=None, objective=OBJECTIVE, groups=GROUPS, resamples=500):
    return choose_policy(decisions, outcomes, parts or costs(n=len(groups)), objective, groups, 0, resamples)


def pair_of_models(rng, n=QUESTIONS):
    """Outcomes that differ on about a third of the questions, a little more often in the server's favour."""
    device = rng.random(n) < 0.6
    server = np.where(rng.random(n) < 0.35, rng.random(n) < 0.7, device)
    return outcomes_of(device, server)


def skilled(outcomes, rng, errors):
    """Sends what the server answers better, with this share of wrong decisions."""
    return np.where(rng.random(len(outcomes.gain)) < errors, rng.random(len(outcomes.gain)) < 0.5, outcomes.gain > 0)


def test_a_router_with_skill_is_served():
    rng = np.random.default_rng(0)
    outcomes = pair_of_models(rng)
    choice = choose(by_policy(rng.random(QUESTIONS) < 0.4, before=skilled(outcomes, rng, 0.1)), outcomes)
    assert (choice.served, choice.reason) == ("learned_before", "supported")
    assert choice.policies["learned_before"].supported
    assert choice.policies["learned_before"].over_random.low > 0.0
    assert not choice.policies["threshold"].supported
    assert not choice.policies["learned_after"].supported  # it sends nothing
    assert describe(choice).startswith("the learned router (before the answer) routes: it is shown to beat chance")


@pytest.mark.parametrize(("remote_j", "place"), [(0.2, "server"), (50.0, "device")])
def test_without_skill_the_place_is_served_that_the_objective_prefers(remote_j, place):
    rng = np.random.default_rng(1)
    outcomes = pair_of_models(rng)
    choice = choose(by_policy(*(rng.random((3, QUESTIONS)) < 0.5)), outcomes, costs(remote_j=remote_j))
    assert (choice.served, choice.reason, choice.cheaper_place) == (place, "unsupported", place)
    assert choice.compared == []
    name = {"server": "the edge server", "device": "the device"}[place]
    assert (
        describe(choice)
        == f"no policy is shown to route better than chance at equal cost, so {name} answers everything"
    )


def test_pure_noise_is_seldom_supported():
    """Any false support in 200 draws of three routers: expected in 2.5 %, one side of the level. Shares are 0 to 1."""
    rng = np.random.default_rng(2)
    supported = 0
    for _ in range(200):
        decisions = by_policy(*(rng.random((3, QUESTIONS)) < rng.random((3, 1))))
        choice = choose(decisions, pair_of_models(rng), resamples=300)
        supported += any(policy.supported for policy in choice.policies.values())
        assert (choice.reason == "unsupported") == (not any(p.supported for p in choice.policies.values()))
    assert supported / 200 <= 0.06


def test_noise_that_is_alike_within_entities_is_seldom_supported():
    """Ten questions about each entity share decision and outcome: resampling questions would support most of these."""
    rng = np.random.default_rng(3)
    groups, supported = [f"entity {n // 10}" for n in range(QUESTIONS)], 0
    for _ in range(200):
        device, server, *sent = (np.repeat(rng.random(30) < 0.5, 10) for _ in range(5))
        choice = choose(by_policy(*sent), outcomes_of(device, server), groups=groups, resamples=400)
        supported += any(policy.supported for policy in choice.policies.values())
    assert supported / 200 <= 0.08
    by_question = 0
    for _ in range(50):
        device, server, *sent = (np.repeat(rng.random(30) < 0.5, 10) for _ in range(5))
        alone = [str(n) for n in range(QUESTIONS)]
        choice = choose(by_policy(*sent), outcomes_of(device, server), groups=alone, resamples=400)
        by_question += any(policy.supported for policy in choice.policies.values())
    assert by_question / 50 > 0.3


def test_routers_fitted_on_noise_are_seldom_supported(tiny_params):
    """The whole way: cross-fitting, thresholds by the objective on the other folds, and the choice."""
    rng = np.random.default_rng(4)
    serving = tiny_params.serving["phone-4gb"].model_copy(update={"objective": OBJECTIVE})
    rows = [{"group": f"entity {n // 2}"} for n in range(120)]
    supported = 0
    for seed in range(40):
        outcomes, parts, folds = pair_of_models(rng, 120), costs(n=120), folds_of(rows, 3, seed)
        x = {look: rng.normal(size=(120, 4)) for look in ("before", "after")}
        worth = {look: held_out_worth(x[look], cross_fit(x[look], outcomes, folds, 0), folds) for look in x}
        decisions = policies(outcomes, parts, rng.random(120), worth, folds, serving)
        choice = choose(decisions, outcomes, parts, groups=[row["group"] for row in rows], resamples=400)
        supported += any(policy.supported for policy in choice.policies.values())
    assert supported <= 5


def test_a_perfect_router_is_supported_although_it_keeps_no_question_that_differs():
    device = np.arange(60) % 3 > 0
    outcomes = outcomes_of(device, np.ones(60, dtype=bool))
    choice = choose(by_policy(~device, n=60), outcomes, groups=[str(n) for n in range(60)])
    assert choice.policies["threshold"].supported
    assert choice.policies["threshold"].over_random.low > 0.0


def test_a_few_questions_on_one_side_are_no_support():
    """Six questions stay on the device, and both places answer them alike: by chance, not by skill."""
    rng = np.random.default_rng(10)
    outcomes, sent = pair_of_models(rng), np.ones(QUESTIONS)
    sent[np.flatnonzero(outcomes.gain == 0.0)[:6]] = 0.0
    choice = choose(by_policy(sent), outcomes)
    assert choice.policies["threshold"].over_random.value > 0.0
    assert choice.policies["threshold"].over_random.p > 0.05
    assert choice.reason == "unsupported"


def test_a_tie_goes_to_the_simpler_policy():
    rng = np.random.default_rng(5)
    outcomes = pair_of_models(rng)
    sent = skilled(outcomes, rng, 0.1)
    free = costs()
    free.embed_s[:], free.embed_j[:] = 0.0, 0.0
    choice = choose(by_policy(sent, after=sent), outcomes, free)
    assert choice.policies["threshold"].supported and choice.policies["learned_after"].supported
    assert choice.served == "threshold"
    assert not any(wins.better == "learned_after" for wins in choice.compared)


def test_a_more_complex_policy_that_is_hardly_better_is_not_served():
    rng = np.random.default_rng(6)
    # No router that errs reaches the quality of this server, so missed quality decides between them.
    outcomes = outcomes_of(rng.random(QUESTIONS) < 0.5, rng.random(QUESTIONS) < 0.95)
    sent = skilled(outcomes, rng, 0.4)
    better = sent.copy()
    better[np.flatnonzero(~sent & (outcomes.gain > 0))[:1]] = True  # one question
    choice = choose(by_policy(sent, after=better), outcomes, costs(remote_j=15.0))  # too much for the server alone
    assert (choice.served, choice.reason) == ("threshold", "simpler")
    [against, alone] = choice.compared
    assert (against.better, against.than, alone.than) == ("learned_after", "threshold", "threshold")
    assert against.share > 0.5 and against.p >= 0.05


def test_a_more_complex_policy_that_is_shown_to_be_better_is_served():
    rng = np.random.default_rng(7)
    outcomes = pair_of_models(rng)
    poor, good = skilled(outcomes, rng, 0.7), skilled(outcomes, rng, 0.02)
    choice = choose(by_policy(poor, after=good), outcomes)
    assert choice.policies["threshold"].supported
    assert (choice.served, choice.reason) == ("learned_after", "supported")
    assert choice.compared[0].p < 0.05


def test_a_supported_policy_beyond_the_energy_budget_gives_way_to_a_place():
    rng = np.random.default_rng(8)
    outcomes = pair_of_models(rng)
    sent = skilled(outcomes, rng, 0.1)
    choice = choose(by_policy(sent), outcomes, costs(remote_j=200.0))
    assert choice.policies["threshold"].supported
    assert (choice.served, choice.reason) == ("device", "place")
    assert describe(choice).startswith("the device answers everything: it is shown to meet the objective better")


def test_the_gain_over_random_by_hand():
    device = np.array([0, 0, 1, 1, 0, 1]) == 1
    server = np.array([1, 1, 0, 1, 0, 1]) == 1
    outcomes = outcomes_of(device, server)  # gains 2, 2, -2, 0, 0, 0
    sent = np.array([1, 0, 0, 1, 0, 0])
    choice = choose(by_policy(sent, n=6), outcomes, costs(n=6), groups=list("abcdef"))
    assert choice.policies["threshold"].over_random.value == pytest.approx(2 / 6 - (2 / 6) * (2 / 6))
    assert choice.policies["threshold"].over_random.n == 6
    assert set(choice.policies) == set(ROUTING)


def test_the_same_seed_gives_the_same_choice_and_a_record_survives_json():
    rng = np.random.default_rng(9)
    outcomes = pair_of_models(rng)
    decisions = by_policy(skilled(outcomes, rng, 0.3))
    choice = choose(decisions, outcomes)
    assert choose(decisions, outcomes) == choice
    assert PolicyChoice.model_validate_json(choice.model_dump_json()) == choice


def chosen(served, reason="supported"):
    place = served if served in ("device", "server") else "device"
    return PolicyChoice(served=served, reason=reason, cheaper_place=place, policies={}, compared=[])


def test_the_chosen_router_differs_by_link(tiny_params, tmp_path):
    serving = tiny_params.serving["phone-4gb"]
    assert serving.policy == "best"
    choices = {"wifi": chosen("threshold"), "4g": chosen("device", "unsupported"), "lan": chosen("server", "place")}
    router = open_router(serving, tmp_path, None, ("a", "b"), choices)
    over = {link: Conditions(link) for link in (*choices, "pigeon")}
    assert router.route_question("?", over["wifi"]) is None
    assert router.route_answer("?", [-5.0], over["wifi"]).place == "server"
    assert router.rule("?", over["wifi"]) == ThresholdRouter(serving.least_confidence).rule("?", over["wifi"])
    unsupported = router.route_question("?", over["4g"])
    assert (unsupported.place, router.rule("?", over["4g"])) == ("device", "device")
    assert unsupported.reason.startswith("no policy is shown to route better than chance")
    assert router.route_question("?", over["lan"]).place == "server"
    assert router.route_question("?", over["pigeon"]).reason == "no measurements for the link pigeon"


def test_a_chosen_learned_router_needs_its_fit(tiny_params, tmp_path):
    serving, choices = tiny_params.serving["phone-4gb"], {"wifi": chosen("learned_after")}
    assert uses_learned(serving, choices)
    with pytest.raises(ArtifactError, match="needs the embedder"):
        open_router(serving, tmp_path, None, ("a", "b"), choices)
    with pytest.raises(ArtifactError, match="needs the choice of the stage `offload`"):
        open_router(serving, tmp_path, None, ("a", "b"))


def test_parts_that_no_link_uses_are_not_opened(tiny_params):
    serving = tiny_params.serving["phone-4gb"]
    alone = {"wifi": chosen("device", "unsupported"), "4g": chosen("device", "place")}
    assert not uses_edge(serving, alone)
    assert not uses_learned(serving, alone)
    assert uses_edge(serving, alone | {"lan": chosen("threshold")})
    named = serving.model_copy(update={"policy": "learned"})
    assert uses_edge(named, {}) and uses_learned(named, {})
    assert open_router(serving.model_copy(update={"policy": "device"}), None, None, ("a", "b")) == FixedRouter("device")


def test_a_record_of_an_older_version_is_named():
    record = results.offload_record("pocket", {"wifi": {}})
    with pytest.raises(
        ArtifactError, match=r"phone\.json: lacks `choices`, because an older version wrote it; run the"
    ):
        require_choices(record, "offload/phone.json")
    with pytest.raises(ArtifactError, match=r"phone\.json: no such file, so no policy is chosen yet"):
        require_choices(None, "offload/phone.json")
    choices = {"wifi": chosen("threshold")}
    assert require_choices(record.model_copy(update={"choices": choices}), "offload/phone.json") == choices
