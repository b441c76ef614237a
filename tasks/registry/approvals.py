"""The role of a version on a device: why it was promoted or refused, and what a person decided."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from lilliput.config import Params
from lilliput.records import Decision, EvaluationRecord, Record
from tasks.registry.get_or_create import active_run_id, truncate
from tasks.registry.model_versions import client
from tasks.registry.version_records import Note, Role, update_role

_REASON_CHARS = 1000  # of a person's reason, which the report and the terminal repeat
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
    update_role(version, device, promoted=reason, refused=None)


def record_refused(version: str, device: str, reason: str) -> None:
    """Stores why `version` is not champion of `device`."""
    update_role(version, device, promoted=None, held=None, refused=reason)


def veto(version: str, device: str, reason: str, params: Params) -> None:
    """Keeps `version` from becoming champion of `device` until the device's rules change."""
    record_refused(version, device, reason)
    update_role(version, device, vetoed=Note(because=reason, fingerprint=_fingerprint(params, device)))


def veto_reason(role: Role, device: str, params: Params) -> str | None:
    """Returns the reason of the veto in the `role` of a version; None if there is none in force."""
    return _reason_in_force(role.vetoed, _fingerprint(params, device))


def hold(version: str, device: str, reason: str, params: Params, records: DeviceRecords) -> None:
    """Keeps `version` champion of `device` until an evaluation or the device's rules change.

    Raises:
        RegistryError: its run was removed permanently, and has all that is known of it.
    """
    active_run_id(client(), version)
    record_promoted(version, device, reason)
    note = Note(because=reason, fingerprint=_fingerprint(params, device, records))
    update_role(version, device, vetoed=None, held=note)


def hold_reason(role: Role, device: str, params: Params, records: DeviceRecords) -> str | None:
    """Returns the reason of the hold in the `role` of the champion; None if there is none in force."""
    return _reason_in_force(role.held, _fingerprint(params, device, records))


def mark_settled(version: str, device: str, params: Params, records: DeviceRecords) -> None:
    """Stores the fingerprint of the evaluations and rules that made `version` champion."""
    update_role(version, device, settled=_fingerprint(params, device, records))


def is_settled(role: Role, device: str, params: Params, records: DeviceRecords) -> bool:
    """Whether evaluations and rules are still those that made the version with this `role` champion."""
    return role.settled == _fingerprint(params, device, records)


def with_recorded_reasons(decision: Decision, champion: Role, others: Mapping[str, Role]) -> Decision:
    """Returns `decision` with the reasons stored in the roles of the champion and of the other candidates, by name."""
    recorded = {name: role.refused for name, role in others.items()}
    refused = decision.refused | {name: why for name, why in recorded.items() if why and name in decision.refused}
    return decision.model_copy(update={"reason": champion.promoted or decision.reason, "refused": refused})


def dated(reason: str) -> str:
    """Returns `on 2024-11-14: <reason>`, with today's date."""
    return f"on {datetime.now().astimezone():%Y-%m-%d}" + (f": {truncate(reason, _REASON_CHARS)}" if reason else "")


def _fingerprint(params: Params, device: str, records: DeviceRecords | None = None) -> str:
    """Returns a digest of the rules and the profile of `device`, and of `records`."""
    rules = [params.promotion[device].model_dump(mode="json"), params.devices[device].model_dump(mode="json")]
    return hashlib.sha256(json.dumps([rules, records], sort_keys=True, default=Record.as_json).encode()).hexdigest()


def _reason_in_force(note: Note | None, fingerprint: str) -> str | None:
    return note.because if note and note.fingerprint == fingerprint else None
