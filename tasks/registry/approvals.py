"""What a version's tags say of its standing with a device: why promoted or refused, and what a person decided."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lilliput.config import Params
from lilliput.promote import Decision
from tasks.registry import model_versions
from tasks.registry.creating import shortened

_REASON_CHARS = 1000  # of what a person wrote; a tag of a version holds 5,000 in a database other than SQLite
# The candidates' records as a device knows them, and whom it cannot run.
Found = tuple[Mapping[str, Any], Mapping[str, str]]


@dataclass(frozen=True)
class Proposal:
    """A champion that waits for a person."""

    device: str
    candidate: str
    version: str
    reason: str


@dataclass(frozen=True)
class Answer:
    """What a person said to the proposal that `version` become a device's champion."""

    version: str
    approved: bool
    because: str


def tell_promoted(version: str, device: str, reason: str) -> None:
    """Stores why `version` is champion of `device`."""
    model_versions.tell(version, {_tag("promoted", device): reason, _tag("refused", device): None})


def tell_refused(version: str, device: str, reason: str) -> None:
    """Stores why `version` is not champion of `device`."""
    tags = {_tag("promoted", device): None, _tag("held", device): None, _tag("refused", device): reason}
    model_versions.tell(version, tags)


def veto(version: str, device: str, because: str, params: Params) -> None:
    """A person's no: `version` is not to become champion of `device` while what is asked there is what it is now."""
    tell_refused(version, device, because)
    model_versions.tell(version, {_tag("vetoed", device): _note(because, _asked(params, device))})


def vetoed(tags: Mapping[str, str], device: str, params: Params) -> str | None:
    """Why a version with `tags` was vetoed, if that is in force."""
    return _in_force(tags.get(_tag("vetoed", device)), _asked(params, device))


def hold(version: str, device: str, because: str, params: Params, found: Found) -> None:
    """A person's choice: `version` stays champion of `device` until an evaluation or the rules change."""
    tell_promoted(version, device, because)
    note = _note(because, _asked(params, device, found))
    model_versions.tell(version, {_tag("vetoed", device): None, _tag("held", device): note})


def held(tags: Mapping[str, str], device: str, params: Params, found: Found) -> str | None:
    """Why the champion with `tags` is to stay, if that is in force."""
    return _in_force(tags.get(_tag("held", device)), _asked(params, device, found))


def settle(version: str, device: str, params: Params, found: Found) -> None:
    """Stores of which evaluations and rules champion `version` is the outcome."""
    model_versions.tell(version, {_tag("settled", device): _asked(params, device, found)})


def as_told(decision: Decision, champion: Mapping[str, str], others: Mapping[str, Mapping[str, str]]) -> Decision:
    """`decision` with the reasons that stand on the champion, whose tags are `champion`, and on others, by name."""
    told = {name: tags.get(_tag("refused", decision.device)) for name, tags in others.items()}
    refused = decision.refused | {name: why for name, why in told.items() if why and name in decision.refused}
    reason = champion.get(_tag("promoted", decision.device)) or decision.reason
    return decision.model_copy(update={"reason": reason, "refused": refused})


def settled(tags: Mapping[str, str], device: str, params: Params, found: Found) -> bool:
    """Whether neither evaluations nor rules have changed since the champion with `tags` was decided on."""
    return tags.get(_tag("settled", device)) == _asked(params, device, found)


def on_this_day(because: str) -> str:
    """`on 2024-11-14: because`."""
    return f"on {datetime.now().astimezone():%Y-%m-%d}" + (f": {shortened(because, _REASON_CHARS)}" if because else "")


def _asked(params: Params, device: str, found: Found | None = None) -> str:
    """Changes when what is asked of a champion of `device` does, or an evaluation in `found`."""
    rules = [params.promotion[device].model_dump(mode="json"), params.devices[device].model_dump(mode="json")]
    return hashlib.sha256(json.dumps([rules, found], sort_keys=True).encode()).hexdigest()


def _note(because: str, of: str) -> str:
    return json.dumps({"because": because, "of": of}, ensure_ascii=False)


def _in_force(note: str | None, of: str) -> str | None:
    found: dict[str, Any] = json.loads(note) if note else {}
    return found["because"] if found.get("of") == of else None


def _tag(what: str, device: str) -> str:
    return f"lilliput.{what}.{device}"
