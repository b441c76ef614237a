import math

from hypothesis import given
from hypothesis import strategies as st

from lilliput.offload.policy import Always, Conditions, Threshold, confidence
from lilliput.serve.circuit_breaker import Breaker

WIFI = Conditions("wifi")


def test_confidence_is_the_geometric_mean_of_probabilities():
    assert confidence([math.log(0.5), math.log(0.125)]) == math.exp(math.log(0.25))
    assert confidence([]) is None


def test_fixed_policies_do_not_look():
    for place in ("device", "server"):
        assert Always(place).before("?", WIFI).place == place


def test_fixed_policies_and_the_threshold_have_one_rule_whatever_link_and_battery():
    rules = [
        [router.rule("?", c) for c in (WIFI, Conditions("poor", 3.0))] for router in (Always("device"), Threshold(0.5))
    ]
    assert rules == [["device"] * 2, ["confidence 0.5"] * 2]
    assert Threshold(0.6).rule("?", WIFI) != rules[1][0]


@given(st.lists(st.floats(-20, 0), max_size=8), st.floats(0, 1))
def test_the_device_keeps_what_it_is_sure_of_and_nothing_else(logprobs, least):
    policy = Threshold(least)
    assert policy.before("?", WIFI) is None
    decision = policy.after("?", logprobs, WIFI)
    sure = bool(logprobs) and decision.score >= least
    assert decision.place == ("device" if sure else "server")


def test_what_fails_three_times_rests_and_then_one_may_try():
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
