"""Tags of a version about its role on a device: why it was promoted or refused, and what a person decided."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lilliput.config import Params
from lilliput.records import Decision, EvaluationRecord, Record
from tasks.registry import model_versions
from tasks.registry.get_or_create import truncate

_REASON_CHARS = 1000  # of a person's reason; a tag of a version holds 5,000 in a database other than SQLite
# The records of the candidates on a device, and why it cannot run the others.
DeviceRecords = tuple[Mapping[str, EvaluationRecord], Mapping[str, str]]


@dataclass(frozen=True)
class Proposal:
    """A new champion that needs a person's approval."""

    device: str
    candidate: str
    version: str
    reason: str


@dataclass(frozen=True)
class ApprovalAnswer:
    """A person's answer to the proposal to promote `version`."""

    version: str
    approved: bool
    reason: str


def record_promoted(version: str, device: str, reason: str) -> None:
    """Stores why `version` is champion of `device`."""
    model_versions.set_tags(version, {_tag("promoted", device): reason, _tag("refused", device): None})


def record_refused(version: str, device: str, reason: str) -> None:
    """Stores why `version` is not champion of `device`."""
    tags = {_tag("promoted", device): None, _tag("held", device): None, _tag("refused", device): reason}
    model_versions.set_tags(version, tags)


def veto(version: str, device: str, reason: str, params: Params) -> None:
    """Keeps `version` from becoming champion of `device` until the device's rules change."""
    record_refused(version, device, reason)
    model_versions.set_tags(version, {_tag("vetoed", device): _encode(reason, _fingerprint(params, device))})


def veto_reason(tags: Mapping[str, str], device: str, params: Params) -> str | None:
    """Returns the reason of the veto in `tags` of a version; None if there is none in force."""
    return _reason_in_force(tags.get(_tag("vetoed", device)), _fingerprint(params, device))


def hold(version: str, device: str, reason: str, params: Params, records: DeviceRecords) -> None:
    """Keeps `version` champion of `device` until an evaluation or the device's rules change."""
    record_promoted(version, device, reason)
    note = _encode(reason, _fingerprint(params, device, records))
    model_versions.set_tags(version, {_tag("vetoed", device): None, _tag("held", device): note})


def hold_reason(tags: Mapping[str, str], device: str, params: Params, records: DeviceRecords) -> str | None:
    """Returns the reason of the hold in `tags` of the champion; None if there is none in force."""
    return _reason_in_force(tags.get(_tag("held", device)), _fingerprint(params, device, records))


def mark_settled(version: str, device: str, params: Params, records: DeviceRecords) -> None:
    """Stores the fingerprint of the evaluations and rules that made `version` champion."""
    model_versions.set_tags(version, {_tag("settled", device): _fingerprint(params, device, records)})


def is_settled(tags: Mapping[str, str], device: str, params: Params, records: DeviceRecords) -> bool:
    """Whether evaluations and rules are still those that made the version with `tags` champion."""
    return tags.get(_tag("settled", device)) == _fingerprint(params, device, records)


def with_recorded_reasons(
    decision: Decision, champion: Mapping[str, str], others: Mapping[str, Mapping[str, str]]
) -> Decision:
    """Returns `decision` with the reasons stored in the tags of the champion and of the other candidates, by name."""
    recorded = {name: tags.get(_tag("refused", decision.device)) for name, tags in others.items()}
    refused = decision.refused | {name: why for name, why in recorded.items() if why and name in decision.refused}
    reason = champion.get(_tag("promoted", decision.device)) or decision.reason
    return decision.model_copy(update={"reason": reason, "refused": refused})


def dated(reason: str) -> str:
    """Returns `on 2024-11-14: <reason>`, with today's date."""
    return f"on {datetime.now().astimezone():%Y-%m-%d}" + (f": {truncate(reason, _REASON_CHARS)}" if reason else "")


def _fingerprint(params: Params, device: str, records: DeviceRecords | None = None) -> str:
    """Returns a digest of the rules and the profile of `device`, and of `records`."""
    rules = [params.promotion[device].model_dump(mode="json"), params.devices[device].model_dump(mode="json")]
    return hashlib.sha256(json.dumps([rules, records], sort_keys=True, default=Record.as_json).encode()).hexdigest()


def _encode(reason: str, fingerprint: str) -> str:
    return json.dumps({"because": reason, "of": fingerprint}, ensure_ascii=False)


def _reason_in_force(note: str | None, fingerprint: str) -> str | None:
    content: dict[str, Any] = json.loads(note) if note else {}
    return content["because"] if content.get("of") == fingerprint else None


def _tag(kind: str, device: str) -> str:
    return f"lilliput.{kind}.{device}"
