"""Simulates days of traffic through a router: battery charge, and the place of each answer by link.

The router is the gateway's, called in the gateway's order. Answers, verdicts, seconds and bytes come from the stage
`offload`. Links follow `links.py`, with random losses and a tail that the next request ends. Seconds, joules and
percentages are estimates.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from lilliput.config import LinkConfig, Section
from lilliput.config.section import LinkName, NotNegativeFloat
from lilliput.errors import DataError, message_of
from lilliput.offload.links import active_j, latency_s, tail_j
from lilliput.offload.outcomes import quality, request_of
from lilliput.offload.policy import Conditions, Router, RoutingDecision

DAY_S = 86_400.0
# Relative number of questions in each hour from midnight: few at night, most in the evening.
_HOURLY_WEIGHTS = (1, 0, 0, 0, 0, 1, 2, 4, 5, 4, 4, 5, 6, 5, 4, 4, 5, 6, 7, 8, 8, 7, 5, 3)
_HOURS_AT_HOME = (*range(8), *range(19, 24))


class Event(Section):
    """A question at a point in time: one line of a trace file.

    Attributes:
        at_s: seconds since the first midnight.
        id: of a recorded question.
        link: the available link.
        charging: whether the battery is being charged.
    """

    at_s: NotNegativeFloat
    id: str
    link: LinkName
    charging: bool = False


@dataclass(frozen=True)
class Phone:
    """Battery and power of a phone.

    Attributes:
        battery_wh: capacity.
        watts_per_core: power of a busy core.
        background_watts: constant power of everything else; declared, not measured.
        charging_watts: power of the charger; declared, not measured.
    """

    battery_wh: float
    watts_per_core: float
    background_watts: float = 0.5
    charging_watts: float = 7.5


@dataclass(frozen=True)
class ServedRequest:
    """The result of an event."""

    event: Event
    decision: RoutingDecision
    latency_s: float
    energy_j: float
    battery_percent: float


@dataclass
class _PhoneState:
    """State between two events: battery charge, end of the device's last answer, and last use of the radio."""

    battery_j: float
    at_s: float = 0.0
    device_free_s: float = 0.0
    radio_end_s: float = -math.inf
    radio_link: LinkConfig | None = None
    served: list[ServedRequest] = field(default_factory=list)


def draw_trace(
    questions: Sequence[str], links: Sequence[str], home: str, days: int, queries_per_day: int, seed: int
) -> list[Event]:
    """Random traffic with a daily rhythm: few questions at night, most in the evening.

    The phone is at home from 19:00 to 8:00, and charges from midnight to 8:00. Away from home, each hour has a random
    link.

    Args:
        questions: ids, drawn uniformly.
        links: the links away from home.
        home: the link at home.
        days: number of days.
        queries_per_day: number of queries, distributed by the rhythm.
        seed: of all random draws.
    """
    rng = random.Random(f"{seed}/trace")
    events = []
    for day in range(days):
        away = {hour: rng.choice(list(links)) for hour in range(24)}
        for hour in sorted(rng.choices(range(24), _HOURLY_WEIGHTS, k=queries_per_day)):
            at_s = day * DAY_S + 3600.0 * (hour + rng.random())
            link = home if hour in _HOURS_AT_HOME else away[hour]
            events.append(Event(at_s=at_s, id=rng.choice(list(questions)), link=link, charging=hour < 8))
    return sorted(events, key=lambda event: event.at_s)


def read_trace(path: Path, questions: Iterable[str], links: Iterable[str]) -> list[Event]:
    """The events of a JSON Lines file, in order of time. Skips blank lines.

    Raises:
        DataError: the file is missing, or a line is not an event, or its question or link is unknown.
    """
    known_questions, known_links = set(questions), set(links)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() also splits at U+2028
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a JSON Lines file, or no file for a random trace") from None
    events = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = Event.model_validate_json(line)
        except ValidationError as error:
            problem = error.errors()[0]
            raise DataError(f"{path}:{number}: {'.'.join(map(str, problem['loc']))}: {message_of(problem)}") from None
        if event.id not in known_questions or event.link not in known_links:
            unknown = f"question {event.id!r}" if event.id not in known_questions else f"link {event.link!r}"
            raise DataError(f"{path}:{number}: the {unknown} is unknown; use one that the stage `offload` recorded")
        events.append(event)
    return sorted(events, key=lambda event: event.at_s)


def simulate(
    trace: Sequence[Event],
    rows: Sequence[Mapping[str, Any]],
    router: Router,
    links: Mapping[str, LinkConfig],
    phone: Phone,
    seed: int,
    embeds: bool = False,
) -> list[ServedRequest]:
    """The result of each event of `trace`. The battery is full at first; the device answers one request at a time.

    Args:
        trace: events in order of time.
        rows: of `ask_both`, for every question of the trace.
        router: routes the questions.
        links: by name.
        phone: battery and power.
        seed: of the losses.
        embeds: whether `router` embeds the questions that it scores; adds the cost of the embedding.
    """
    by_id = {row["id"]: row for row in rows}
    rng = np.random.default_rng(seed)
    state = _PhoneState(battery_j=phone.battery_wh * 3600.0)
    for event in trace:
        _advance(state, event, phone)
        _serve(state, event, by_id[event.id], router, links[event.link], phone, rng, embeds)
    return state.served


def _advance(state: _PhoneState, event: Event, phone: Phone) -> None:
    """Charges and drains the battery until `event`. A charger at the event charges since the last event."""
    elapsed_s = event.at_s - state.at_s
    watts = phone.background_watts - (phone.charging_watts if event.charging else 0.0)
    state.battery_j = min(phone.battery_wh * 3600.0, max(0.0, state.battery_j - watts * elapsed_s))
    state.at_s = event.at_s


def _serve(
    state: _PhoneState,
    event: Event,
    row: Mapping[str, Any],
    router: Router,
    link: LinkConfig,
    phone: Phone,
    rng: np.random.Generator,
    embeds: bool,
) -> None:
    full_j = phone.battery_wh * 3600.0
    conditions = Conditions(event.link, 100.0 * state.battery_j / full_j)
    now_s, spent_j, device_asked = event.at_s, 0.0, False
    decision = router.route_question(row["question"], conditions)
    if decision is None:
        now_s, spent_j, device_asked = *_ask_device(state, row, phone, now_s), True
        decision = router.route_answer(row["question"], row["device"]["logprobs"], conditions)
    if embeds and decision.score is not None:
        now_s += row["embed_s"]
        spent_j += row["embed_cpu_s"] * phone.watts_per_core
    if decision.place == "server":
        now_s, joules = _ask_server(state, row, link, now_s, rng)
        spent_j += joules
    elif not device_asked:
        now_s, joules = _ask_device(state, row, phone, now_s)
        spent_j += joules
    state.battery_j = max(0.0, state.battery_j - spent_j)
    percent = 100.0 * state.battery_j / full_j
    state.served.append(ServedRequest(event, decision, now_s - event.at_s, spent_j, percent))


def _ask_device(state: _PhoneState, row: Mapping[str, Any], phone: Phone, now_s: float) -> tuple[float, float]:
    """Time of the device's answer, and its joules. The request waits for the one before it."""
    done_s = max(now_s, state.device_free_s) + row["device"]["seconds"]
    state.device_free_s = done_s
    return done_s, row["device"]["cpu_s"] * phone.watts_per_core


def _ask_server(
    state: _PhoneState, row: Mapping[str, Any], link: LinkConfig, now_s: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Time of the server's answer, and the radio's joules, minus the unused part of the last request's tail."""
    request = request_of(row)
    resends = float(rng.negative_binomial(request.packets, 1.0 - link.loss))
    done_s = now_s + latency_s(request, link, resends)
    joules = active_j(request, link, resends) + tail_j(link)
    if state.radio_link is not None:
        joules -= tail_j(state.radio_link) - tail_j(state.radio_link, max(0.0, now_s - state.radio_end_s))
    state.radio_end_s, state.radio_link = done_s, link
    return done_s, joules


def summarise(served: Sequence[ServedRequest], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Battery by day, offloaded share by link, accuracy, hallucination rate, latency and joules of all answers."""
    by_id = {row["id"]: row for row in rows}
    answers = [by_id[s.event.id][s.decision.place] for s in served]
    answerable = [by_id[s.event.id]["answerable"] for s in served]
    right = [quality(answer) for answer, can in zip(answers, answerable, strict=True) if can]
    hallucinated = [answer["hallucinated"] for answer in answers if answer["hallucinated"] is not None]
    latencies_ms = [1e3 * s.latency_s for s in served]
    days = sorted({int(s.event.at_s // DAY_S) for s in served})
    last = {day: [s for s in served if s.event.at_s // DAY_S == day][-1] for day in days}
    links = sorted({s.event.link for s in served})
    return {
        "queries": len(served),
        "battery_percent_by_day": [last[day].battery_percent for day in days],
        "least_battery_percent": min(s.battery_percent for s in served),
        "offloaded": {link: _offloaded([s for s in served if s.event.link == link]) for link in links},
        "accuracy": sum(right) / len(right) if right else None,
        "hallucination_rate": sum(hallucinated) / len(hallucinated) if hallucinated else None,
        "latency_ms": dict(zip(("p50", "p90"), map(float, np.quantile(latencies_ms, [0.5, 0.9])), strict=True)),
        "energy_j": sum(s.energy_j for s in served),
        "measured": False,
    }


def _offloaded(served: Sequence[ServedRequest]) -> float:
    return sum(s.decision.place == "server" for s in served) / len(served)


def trace_lines(events: Iterable[Event]) -> str:
    """`events` as JSON Lines, the format of `read_trace`."""
    return "".join(json.dumps(event.model_dump(mode="json"), sort_keys=True) + "\n" for event in events)
