"""The simulator, checked by hand and against the live gateway with fake backends."""

import asyncio

import numpy as np
import pytest

from lilliput.errors import DataError
from lilliput.offload.policy import FixedRouter, RoutingDecision, ThresholdRouter
from lilliput.offload.simulate import (
    DAY_S,
    Event,
    Phone,
    draw_trace,
    read_trace,
    simulate,
    summarise,
    trace_lines,
)
from tests.offload.links import link
from tests.offload.test_judge import row
from tests.serve import fakes

LINK = fakes.WIFI  # 8 Mbit/s, 10 ms, no loss, 0.5 W, a tail of 0.2 s at 0.1 W
QUIET = Phone(battery_wh=1.0, watts_per_core=2.0, background_watts=0.0)
ROWS = [row(0, "W", "R"), row(1, "R", "R"), row(2, "R", "W"), row(3, "W", "A", answerable=False)]
SENDING_S = 0.010 + 8e-6 * (500 / 8 + 500 / 8)
SENT_J = 1000 * 1e-6


def event(at_s, number=0, link="wifi", charging=False):
    return Event(at_s=at_s, id=f"q/{number}", link=link, charging=charging)


def play(trace, router, phone=QUIET, links=None, **more):
    return simulate(trace, ROWS, router, links or {"wifi": LINK, "poor": LINK}, phone, 0, **more)


def test_device_answers_one_request_at_a_time():
    first, second = play([event(0.0), event(0.2, 1)], FixedRouter("device"))
    assert (first.latency_s, second.latency_s) == pytest.approx((0.5, 0.8))  # the second waits 0.3 s
    assert (first.energy_j, second.energy_j) == pytest.approx((0.8, 0.8))
    assert second.battery_percent == pytest.approx(100 * (1 - 1.6 / 3600))


def test_request_costs_bytes_waiting_and_its_part_of_the_tail():
    one_s = SENDING_S + 1.0
    active_j = SENT_J + 0.5 * one_s
    served = play([event(0.0), event(one_s + 0.05), event(100.0)], FixedRouter("server"))
    assert [s.latency_s for s in served] == pytest.approx([one_s] * 3)
    # The first tail lasted 0.05 s of its 0.2 s; the second request gets the rest back.
    by_hand = [active_j + 0.02, active_j + 0.02 - 0.15 * 0.1, active_j + 0.02]
    assert [s.energy_j for s in served] == pytest.approx(by_hand)


def test_cascade_pays_for_both_backends():
    [served] = play([event(0.0)], ThresholdRouter(1.0), embeds=True)
    assert served.latency_s == pytest.approx(0.5 + 0.01 + SENDING_S + 1.0)
    assert served.energy_j == pytest.approx(0.8 + 0.04 + SENT_J + 0.5 * (SENDING_S + 1.0) + 0.02)


def test_random_losses_match_their_expectation():
    lossy = LINK.model_copy(update={"loss": 0.2})
    served = play([event(10.0 * n) for n in range(2000)], FixedRouter("server"), links={"wifi": lossy})
    resends = np.array([(s.latency_s - SENDING_S - 1.0) / 0.2 for s in served])
    assert resends == pytest.approx(np.round(resends), abs=1e-6)
    assert resends.mean() == pytest.approx(2 * 0.25, abs=0.05)
    again = play([event(10.0 * n) for n in range(2000)], FixedRouter("server"), links={"wifi": lossy})
    assert [s.latency_s for s in again] == [s.latency_s for s in served]


def test_battery_drains_charges_and_stays_within_limits():
    phone = Phone(battery_wh=1.0, watts_per_core=0.0, background_watts=0.5, charging_watts=1.5)
    hours = [event(3600.0 * h, charging=h > 3) for h in (1, 3, 4)]
    assert [s.battery_percent for s in play(hours, FixedRouter("device"), phone)] == pytest.approx([50.0, 0.0, 100.0])


class Careful:
    """Selects the server while link and battery are good."""

    def route_question(self, question, conditions, others=()):
        good = conditions.link == "wifi" and conditions.battery_percent > 50
        return RoutingDecision(
            "server" if good else "device", None, f"{conditions.link} {conditions.battery_percent:.0f}"
        )

    def route_answer(self, question, token_logprobs, conditions, others=()):
        raise AssertionError("the decision was before generation")

    def rule(self, question, conditions):
        return self.route_question(question, conditions).reason


def test_summary_by_hand():
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


def test_summary_of_rows_with_only_a_reference_has_scores_and_no_hallucination_rate():
    only_reference = {"right": None, "hallucinated": None, "score": 0.25}
    rows = [row | {place: row[place] | only_reference for place in ("device", "server")} for row in ROWS]
    served = play([event(0, 0), event(600, 1, "poor")], Careful(), Phone(battery_wh=1.0, watts_per_core=0.0))
    found = summarise(served, rows)
    assert (found["accuracy"], found["hallucination_rate"]) == (0.25, None)


def test_random_trace_follows_the_daily_rhythm_and_round_trips(tmp_path):
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
        ('{"at_s": 1.0, "id": "q/9", "link": "wifi"}', "question 'q/9' is unknown"),
        ('{"at_s": 1.0, "id": "q/0", "link": "pigeon"}', "link 'pigeon' is unknown"),
        ('{"at_s": "soon", "id": "q/0", "link": "wifi"}', "at_s: "),
        ("nonsense", ":1: "),
    ],
)
def test_invalid_trace_error_names_the_line(tmp_path, line, problem):
    path = tmp_path / "trace.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=problem):
        read_trace(path, ["q/0"], ["wifi"])


def test_only_line_feeds_end_the_lines_of_a_trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    line = '{"at_s": %d, "id": "q/\u2028\x85", "link": "wifi"}\n'
    path.write_text(line % 2 + "\n" + line % 1, encoding="utf-8")
    assert [e.at_s for e in read_trace(path, ["q/\u2028\x85"], ["wifi"])] == [1.0, 2.0]
    path.write_text(line % 1 + "\n" + "nonsense", encoding="utf-8")
    with pytest.raises(DataError, match=":3: "):
        read_trace(path, ["q/\u2028\x85"], ["wifi"])


@pytest.mark.parametrize("router", [ThresholdRouter(0.5), Careful()], ids=["after", "before"])
def test_live_gateway_agrees_with_the_simulation(router):
    rows = [row(n, "W", "R", logprob=-3.0 if n % 2 else -0.1) for n in range(6)]
    delays = {"device": 0.03, "server": 0.06}
    for one in rows:
        for place, seconds in delays.items():
            one[place]["seconds"] = seconds
    phone = Phone(battery_wh=1.0, watts_per_core=2.0, background_watts=50.0)
    trace = [event(12.0 * n, n, "poor" if n == 2 else "wifi") for n in range(6)]
    still = link(round_trip_ms=0.0, up_mbit_per_s=1e9, down_mbit_per_s=1e9)
    served = simulate(trace, rows, router, {"wifi": still, "poor": still}, phone, 0)

    by_question = {one["question"]: one["device"]["logprobs"][0] for one in rows}
    backends = fakes.FakeBackends()
    backends.delay_s = delays
    backends.answers["device"] = lambda body: fakes.completion("d", by_question[body["messages"][-1]["content"]])
    app = fakes.app(backends, router)

    async def live():
        async with fakes.client(app) as http:
            found, left = [], 100.0
            for one, was in zip(rows, served, strict=True):
                headers = {"x-lilliput-link": was.event.link, "x-lilliput-battery-percent": f"{left:.6f}"}
                body = {"messages": [{"role": "user", "content": one["question"]}]}
                found.append((await http.post("/v1/chat/completions", json=body, headers=headers)).json()["lilliput"])
                left = was.battery_percent - 100 * 12.0 * 50.0 / 3600  # until the next question
            return found

    found = asyncio.run(live())
    assert [metadata["place"] for metadata in found] == [s.decision.place for s in served]
    assert {s.decision.place for s in served} == {"device", "server"}
    for metadata, was in zip(found, served, strict=True):
        assert was.latency_s - 0.005 <= metadata["seconds"] < was.latency_s + 1.0  # other load may delay it
