import math

from hypothesis import given
from hypothesis import strategies as st

from lilliput.offload.policy import Conditions, FixedRouter, ThresholdRouter, confidence
from lilliput.serve.circuit_breaker import Breaker

WIFI = Conditions("wifi")


def test_confidence_is_the_geometric_mean_of_probabilities():
    assert confidence([math.log(0.5), math.log(0.125)]) == math.exp(math.log(0.25))
    assert confidence([]) is None


def test_fixed_policies_decide_before_generation():
    for place in ("device", "server"):
        assert FixedRouter(place).route_question("?", WIFI).place == place


def test_rule_of_simple_policies_ignores_link_and_battery():
    rules = [
        [router.rule("?", c) for c in (WIFI, Conditions("poor", 3.0))]
        for router in (FixedRouter("device"), ThresholdRouter(0.5))
    ]
    assert rules == [["device"] * 2, ["confidence 0.5"] * 2]
    assert ThresholdRouter(0.6).rule("?", WIFI) != rules[1][0]


@given(st.lists(st.floats(-20, 0), max_size=8), st.floats(0, 1))
def test_threshold_router_keeps_confident_answers(logprobs, least):
    policy = ThresholdRouter(least)
    assert policy.route_question("?", WIFI) is None
    decision = policy.route_answer("?", logprobs, WIFI)
    sure = bool(logprobs) and decision.score >= least
    assert decision.place == ("device" if sure else "server")


def test_circuit_breaker_pauses_then_admits_one_request():
    now = [0.0]
    breaker = Breaker(failures=3, rest_s=10, clock=lambda: now[0])
    for _ in range(3):
        assert breaker.admits()
        breaker.failed()
    assert not breaker.admits()
    now[0] = 10.0
    assert breaker.admits()
    assert not breaker.admits()  # one at a time
    breaker.succeeded()
    assert breaker.admits()
