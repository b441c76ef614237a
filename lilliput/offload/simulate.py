"""Days of traffic played through a router: what they do to a battery, and who answers over which link.

The router is the gateway's own, asked in the gateway's order; answers, their verdicts, seconds and bytes are those that
the stage `offload` recorded; the links are those of `links.py`, with losses drawn and a tail that ends where the next
request begins. Seconds, joules and percents are estimates.
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
from lilliput.errors import DataError
from lilliput.offload.links import Request, active_j, latency_s, tail_j
from lilliput.offload.policy import Conditions, Decision, Router

DAY_S = 86_400.0
# Questions an hour from midnight on, in parts of the day's: few at night, most in the evening.
_HOURS = (1, 0, 0, 0, 0, 1, 2, 4, 5, 4, 4, 5, 6, 5, 4, 4, 5, 6, 7, 8, 8, 7, 5, 3)
_AT_HOME = (*range(8), *range(19, 24))


class Event(Section):
    """A question at a time: a line of a trace file.

    Attributes:
        at_s: since the first midnight.
        id: of a recorded question.
        link: that is there then.
        charging: whether the battery is being charged then.
    """

    at_s: NotNegativeFloat
    id: str
    link: LinkName
    charging: bool = False


@dataclass(frozen=True)
class Phone:
    """What the battery lives on.

    Attributes:
        battery_wh: what it holds, full.
        watts_per_core: what a busy core draws.
        background_watts: what everything else draws all the time; declared.
        charging_watts: what a charger brings; declared.
    """

    battery_wh: float
    watts_per_core: float
    background_watts: float = 0.5
    charging_watts: float = 7.5


@dataclass(frozen=True)
class Served:
    """What came of an event."""

    event: Event
    decision: Decision
    latency_s: float
    energy_j: float
    battery_percent: float


@dataclass
class _State:
    """Between two events: what the battery holds, until when the device is busy, and what the radio has done."""

    battery_j: float
    at_s: float = 0.0
    device_free_s: float = 0.0
    radio_end_s: float = -math.inf
    radio_link: LinkConfig | None = None
    served: list[Served] = field(default_factory=list)


def draw_trace(
    questions: Sequence[str], links: Sequence[str], home: str, days: int, queries_per_day: int, seed: int
) -> list[Event]:
    """Traffic with a daily rhythm: few questions at night, most in the evening.

    From 19 to 8 o'clock the phone is at home, charged from midnight on; on the way, each hour has a link of its own.

    Args:
        questions: ids; each is as likely as any other.
        links: that occur on the way.
        home: the link at home.
        days: how many.
        queries_per_day: how many, spread by the rhythm.
        seed: of all draws.
    """
    rng = random.Random(f"{seed}/trace")
    events = []
    for day in range(days):
        away = {hour: rng.choice(list(links)) for hour in range(24)}
        for hour in sorted(rng.choices(range(24), _HOURS, k=queries_per_day)):
            at_s = day * DAY_S + 3600.0 * (hour + rng.random())
            link = home if hour in _AT_HOME else away[hour]
            events.append(Event(at_s=at_s, id=rng.choice(list(questions)), link=link, charging=hour < 8))
    return sorted(events, key=lambda event: event.at_s)


def read_trace(path: Path, questions: Iterable[str], links: Iterable[str]) -> list[Event]:
    """The events of a JSON Lines file, in the order of their times.

    Raises:
        DataError: the file is missing, or a line is no event, or names a question or a link that is not there.
    """
    known, there = set(questions), set(links)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a trace as JSON Lines, or none") from None
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = Event.model_validate_json(line)
        except ValidationError as error:
            problem = error.errors()[0]
            raise DataError(f"{path}:{number}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
        if event.id not in known or event.link not in there:
            unknown = f"question {event.id!r}" if event.id not in known else f"link {event.link!r}"
            raise DataError(f"{path}:{number}: the {unknown} is not among those recorded")
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
) -> list[Served]:
    """What comes of each event of `trace`; the battery is full at first, and the device answers one at a time.

    Args:
        trace: in the order of time.
        rows: of lilliput/offload/collect.py, for every question of the trace.
        router: who answers.
        links: by name.
        phone: its battery.
        seed: of the losses.
        embeds: whether `router` embeds the questions it scores; what that takes is added where it did.
    """
    by_id = {row["id"]: row for row in rows}
    rng = np.random.default_rng(seed)
    state = _State(battery_j=phone.battery_wh * 3600.0)
    for event in trace:
        _let_pass(state, event, phone)
        _serve(state, event, by_id[event.id], router, links[event.link], phone, rng, embeds)
    return state.served


def _let_pass(state: _State, event: Event, phone: Phone) -> None:
    """Charges and drains the battery until `event`; a charger that is there at an event was there since the last."""
    passed_s = event.at_s - state.at_s
    watts = phone.background_watts - (phone.charging_watts if event.charging else 0.0)
    state.battery_j = min(phone.battery_wh * 3600.0, max(0.0, state.battery_j - watts * passed_s))
    state.at_s = event.at_s


def _serve(
    state: _State,
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
    now_s, spent_j, asked = event.at_s, 0.0, False
    decision = router.before(row["question"], conditions)
    if decision is None:
        now_s, spent_j, asked = *_ask_device(state, row, phone, now_s), True
        decision = router.after(row["question"], row["device"]["logprobs"], conditions)
    if embeds and decision.score is not None:
        now_s += row["embed_s"]
        spent_j += row["embed_cpu_s"] * phone.watts_per_core
    if decision.place == "server":
        now_s, joules = _ask_server(state, row, link, now_s, rng)
        spent_j += joules
    elif not asked:
        now_s, joules = _ask_device(state, row, phone, now_s)
        spent_j += joules
    state.battery_j = max(0.0, state.battery_j - spent_j)
    percent = 100.0 * state.battery_j / full_j
    state.served.append(Served(event, decision, now_s - event.at_s, spent_j, percent))


def _ask_device(state: _State, row: Mapping[str, Any], phone: Phone, now_s: float) -> tuple[float, float]:
    """When the device has answered, and its joules; it waits until it has done with the one before."""
    done_s = max(now_s, state.device_free_s) + row["device"]["seconds"]
    state.device_free_s = done_s
    return done_s, row["device"]["cpu_s"] * phone.watts_per_core


def _ask_server(
    state: _State, row: Mapping[str, Any], link: LinkConfig, now_s: float, rng: np.random.Generator
) -> tuple[float, float]:
    """When the server's answer is there, and the radio's joules: a whole tail, less what the last had too much."""
    told = row["server"]
    request = Request(told["up_bytes"], told["down_bytes"], told["seconds"])
    resends = float(rng.negative_binomial(request.packets, 1.0 - link.loss))
    done_s = now_s + latency_s(request, link, resends)
    joules = active_j(request, link, resends) + tail_j(link)
    if state.radio_link is not None:
        joules -= tail_j(state.radio_link) - tail_j(state.radio_link, max(0.0, now_s - state.radio_end_s))
    state.radio_end_s, state.radio_link = done_s, link
    return done_s, joules


def summarise(served: Sequence[Served], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Battery by day, share offloaded by link, accuracy, hallucination rate, latency and joules of what was served."""
    by_id = {row["id"]: row for row in rows}
    answers = [by_id[s.event.id][s.decision.place] for s in served]
    answerable = [by_id[s.event.id]["answerable"] for s in served]
    right = [bool(answer["right"]) for answer, can in zip(answers, answerable, strict=True) if can]
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
        "hallucination_rate": sum(bool(answer["hallucinated"]) for answer in answers) / len(answers),
        "latency_ms": dict(zip(("p50", "p90"), map(float, np.quantile(latencies_ms, [0.5, 0.9])), strict=True)),
        "energy_j": sum(s.energy_j for s in served),
        "measured": False,
    }


def _offloaded(served: Sequence[Served]) -> float:
    return sum(s.decision.place == "server" for s in served) / len(served)


class ByQuestion:
    """A router that leaves each question to one of several: to the one fitted without its entity, say."""

    def __init__(self, routers: Mapping[str, Router]) -> None:
        self._routers = routers

    def before(self, question: str, conditions: Conditions) -> Decision | None:
        """As the question's own router."""
        return self._routers[question].before(question, conditions)

    def after(self, question: str, token_logprobs: Sequence[float], conditions: Conditions) -> Decision:
        """As the question's own router."""
        return self._routers[question].after(question, token_logprobs, conditions)

    def rule(self, question: str, conditions: Conditions) -> str:
        """As the question's own router."""
        return self._routers[question].rule(question, conditions)


def trace_lines(events: Iterable[Event]) -> str:
    """`events` as JSON Lines, as `read_trace` reads them."""
    return "".join(json.dumps(event.model_dump(mode="json"), sort_keys=True) + "\n" for event in events)
