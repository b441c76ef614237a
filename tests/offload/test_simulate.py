"""The simulator by hand, and against the live gateway on paper ends."""

import asyncio

import numpy as np
import pytest

from lilliput.config import LinkConfig
from lilliput.errors import DataError
from lilliput.offload.policy import Always, Conditions, Decision, Threshold
from lilliput.offload.simulate import (
    DAY_S,
    ByQuestion,
    Event,
    Phone,
    draw_trace,
    read_trace,
    simulate,
    summarise,
    trace_lines,
)
from tests.offload.test_judge import row
from tests.serve import paper

LINK = paper.WIFI  # 8 Mbit/s, 10 ms, no loss, 0.5 W, a tail of 0.2 s at 0.1 W
QUIET = Phone(battery_wh=1.0, watts_per_core=2.0, background_watts=0.0)
ROWS = [row(0, "W", "R"), row(1, "R", "R"), row(2, "R", "W"), row(3, "W", "A", answerable=False)]
SENDING_S = 0.010 + 8e-6 * (500 / 8 + 500 / 8)
SENT_J = 1000 * 1e-6


def event(at_s, number=0, link="wifi", charging=False):
    return Event(at_s=at_s, id=f"q/{number}", link=link, charging=charging)


def play(trace, router, phone=QUIET, links=None, **more):
    return simulate(trace, ROWS, router, links or {"wifi": LINK, "poor": LINK}, phone, 0, **more)


def test_the_device_takes_its_own_time_and_joules_one_at_a_time():
    first, second = play([event(0.0), event(0.2, 1)], Always("device"))
    assert (first.latency_s, second.latency_s) == pytest.approx((0.5, 0.8))  # the second waits 0.3 s
    assert (first.energy_j, second.energy_j) == pytest.approx((0.8, 0.8))
    assert second.battery_percent == pytest.approx(100 * (1 - 1.6 / 3600))


def test_a_request_pays_for_bytes_waiting_and_the_tail_that_the_next_one_leaves_it():
    one_s = SENDING_S + 1.0
    active_j = SENT_J + 0.5 * one_s
    served = play([event(0.0), event(one_s + 0.05), event(100.0)], Always("server"))
    assert [s.latency_s for s in served] == pytest.approx([one_s] * 3)
    # The first tail lasted 0.05 s of its 0.2 s: the rest is given back where the second begins.
    by_hand = [active_j + 0.02, active_j + 0.02 - 0.15 * 0.1, active_j + 0.02]
    assert [s.energy_j for s in served] == pytest.approx(by_hand)


def test_who_looks_first_pays_for_both():
    [served] = play([event(0.0)], Threshold(1.0), embeds=True)
    assert served.latency_s == pytest.approx(0.5 + 0.01 + SENDING_S + 1.0)
    assert served.energy_j == pytest.approx(0.8 + 0.04 + SENT_J + 0.5 * (SENDING_S + 1.0) + 0.02)


def test_losses_are_drawn_and_as_many_as_expected_on_average():
    lossy = LINK.model_copy(update={"loss": 0.2})
    served = play([event(10.0 * n) for n in range(2000)], Always("server"), links={"wifi": lossy})
    resends = np.array([(s.latency_s - SENDING_S - 1.0) / 0.2 for s in served])
    assert resends == pytest.approx(np.round(resends), abs=1e-6)
    assert resends.mean() == pytest.approx(2 * 0.25, abs=0.05)
    again = play([event(10.0 * n) for n in range(2000)], Always("server"), links={"wifi": lossy})
    assert [s.latency_s for s in again] == [s.latency_s for s in served]


def test_the_battery_drains_charges_and_stays_within_its_ends():
    phone = Phone(battery_wh=1.0, watts_per_core=0.0, background_watts=0.5, charging_watts=1.5)
    hours = [event(3600.0 * h, charging=h > 3) for h in (1, 3, 4)]
    assert [s.battery_percent for s in play(hours, Always("device"), phone)] == pytest.approx([50.0, 0.0, 100.0])


class Careful:
    """The server while link and battery are good."""

    def before(self, question, conditions):
        good = conditions.link == "wifi" and conditions.battery_percent > 50
        return Decision("server" if good else "device", None, f"{conditions.link} {conditions.battery_percent:.0f}")

    def after(self, question, token_logprobs, conditions):
        raise AssertionError("it has decided before")

    def rule(self, question, conditions):
        return self.before(question, conditions).reason


def test_a_summary_by_hand():
    phone = Phone(battery_wh=1.0, watts_per_core=0.0, background_watts=0.5)
    trace = [event(0, 0), event(600, 1, "poor"), event(4000, 2), event(DAY_S, 3, charging=True)]
    served = play(trace, Careful(), phone)
    assert [s.decision.place for s in served] == ["server", "device", "device", "server"]
    found = summarise(served, ROWS)
    assert found["offloaded"] == {"poor": 0.0, "wifi": pytest.approx(2 / 3)}
    assert (found["accuracy"], found["hallucination_rate"]) == (1.0, 0.0)
    one_j = SENT_J + 0.5 * (SENDING_S + 1.0) + 0.02
    assert found["battery_percent_by_day"] == pytest.approx(
        [100 - (0.5 * 4000 + one_j) / 36, 100 - one_j / 36], abs=1e-6
    )
    assert found["latency_ms"]["p50"] == pytest.approx(1e3 * (0.5 + SENDING_S + 1.0) / 2)


def test_a_drawn_day_has_its_rhythm_and_survives_its_file(tmp_path):
    trace = draw_trace(["q/0", "q/1"], ["wifi", "poor"], "wifi", 3, 400, 7)
    assert trace == draw_trace(["q/0", "q/1"], ["wifi", "poor"], "wifi", 3, 400, 7)
    assert [int(e.at_s // DAY_S) for e in trace] == [0] * 400 + [1] * 400 + [2] * 400
    hours = [int(e.at_s % DAY_S // 3600) for e in trace]
    assert not {1, 2, 3, 4} & set(hours)
    assert hours.count(19) > hours.count(7) > 0
    assert {e.link for e in trace if e.at_s % DAY_S < 8 * 3600} == {"wifi"}
    assert {e.link for e in trace} == {"wifi", "poor"}
    path = tmp_path / "trace.jsonl"
    path.write_text(trace_lines(trace))
    assert read_trace(path, ["q/0", "q/1"], ["wifi", "poor"]) == trace


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"at_s": 1.0, "id": "q/9", "link": "wifi"}', "question 'q/9' is not among"),
        ('{"at_s": 1.0, "id": "q/0", "link": "pigeon"}', "link 'pigeon' is not among"),
        ('{"at_s": "soon", "id": "q/0", "link": "wifi"}', "at_s: "),
        ("nonsense", ":1: "),
    ],
)
def test_what_is_no_trace_is_told_with_its_line(tmp_path, line, problem):
    path = tmp_path / "trace.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=problem):
        read_trace(path, ["q/0"], ["wifi"])


def test_each_question_may_have_a_router_of_its_own():
    router = ByQuestion({"a": Always("device"), "b": Threshold(0.5)})
    assert router.before("a", Conditions("wifi")).place == "device"
    assert router.before("b", Conditions("wifi")) is None
    assert router.after("b", [-5.0], Conditions("wifi")).place == "server"
    assert [router.rule(question, Conditions("wifi")) for question in "ab"] == ["device", "confidence 0.5"]


@pytest.mark.parametrize("router", [Threshold(0.5), Careful()], ids=["after", "before"])
def test_the_live_gateway_does_the_same_in_the_same_order(router):
    rows = [row(n, "W", "R", logprob=-3.0 if n % 2 else -0.1) for n in range(6)]
    delays = {"device": 0.03, "server": 0.06}
    for one in rows:
        for place, seconds in delays.items():
            one[place]["seconds"] = seconds
    phone = Phone(battery_wh=1.0, watts_per_core=2.0, background_watts=50.0)
    trace = [event(12.0 * n, n, "poor" if n == 2 else "wifi") for n in range(6)]
    still = LinkConfig(**LINK.model_dump() | {"round_trip_ms": 0.0, "up_mbit_per_s": 1e9, "down_mbit_per_s": 1e9})
    served = simulate(trace, rows, router, {"wifi": still, "poor": still}, phone, 0)

    by_question = {one["question"]: one["device"]["logprobs"][0] for one in rows}
    ends = paper.Paper()
    ends.delay_s = delays
    ends.says["device"] = lambda asked: paper.completion("d", by_question[asked["messages"][-1]["content"]])
    app = paper.app(ends, router)

    async def live():
        async with paper.client(app) as http:
            found, left = [], 100.0
            for one, was in zip(rows, served, strict=True):
                headers = {"x-lilliput-link": was.event.link, "x-lilliput-battery-percent": f"{left:.6f}"}
                body = {"messages": [{"role": "user", "content": one["question"]}]}
                found.append((await http.post("/v1/chat/completions", json=body, headers=headers)).json()["lilliput"])
                left = was.battery_percent - 100 * 12.0 * 50.0 / 3600  # until the next question
            return found

    found = asyncio.run(live())
    assert [told["place"] for told in found] == [s.decision.place for s in served]
    assert {s.decision.place for s in served} == {"device", "server"}
    for told, was in zip(found, served, strict=True):
        assert was.latency_s - 0.005 <= told["seconds"] < was.latency_s + 1.0  # whatever else the machine does
