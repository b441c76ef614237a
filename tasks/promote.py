"""Decide which candidate is best for each device, and point the registry's aliases at it.

One function for all doors: the stage `promote`, which `dvc repro` and the flow democratize run, and flows/promote.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from lilliput.artifacts import write_json
from lilliput.config import Params
from lilliput.errors import ArtifactError, ConfigError
from lilliput.promote import Decision, decide
from tasks import layout
from tasks.records import device_record
from tasks.registry import approvals, model_versions, outbox
from tasks.registry.approvals import Answer, Proposal
from tasks.registry.candidates import Pool, read_pool
from tasks.registry.model_versions import CHALLENGER, CHAMPION, PREVIOUS
from tasks.registry.past_champion import as_device_knows, read_past


@model_versions.in_reach()
def promote(params: Params, answers: Mapping[str, Answer] | None = None) -> None:
    """Writes promotion.json, moves the aliases `champion-`, `challenger-` and `previous-<device>`, and tells why.

    Args:
        params: of the project.
        answers: by device, what a person said where the rules ask for approval; without one nothing moves there.
    """
    with model_versions.alone():
        pool = read_pool(params)
        decisions = {device: _decide(device, pool, (answers or {}).get(device)) for device in params.promotion}
        model_versions.forget_devices(params.promotion)
        for device, decision in decisions.items():
            _move(device, decision, pool)
        write_json(layout.PROMOTION, {device: _told(params, decision) for device, decision in decisions.items()})


@model_versions.in_reach()
def proposals(params: Params) -> list[Proposal]:
    """The champions that wait for a person, as things stand; moves nothing."""
    with model_versions.alone():
        pool = read_pool(params)
        decisions = [_by_rules(device, pool) for device in params.promotion]
        return [
            Proposal(decision.device, decision.champion, pool.versions[decision.champion], decision.reason)
            for decision in decisions
            if decision.champion and _needs_approval(decision, pool)
        ]


@model_versions.in_reach()
def roll_back(params: Params, device: str, because: str) -> None:
    """Restores the champion before this one, and keeps it until an evaluation or the rules of `device` change.

    The version that steps down has the reason on it, and becomes `previous-<device>`: a second rollback undoes the
    first.

    Raises:
        ConfigError: the device has no rules, or no champion before this one.
    """
    if device not in params.promotion:
        raise ConfigError(f"--rollback {device}: no such device under `promotion`: {', '.join(params.promotion)}")
    with model_versions.alone():
        previous, champion = (
            model_versions.version_of(f"{PREVIOUS}{device}"),
            model_versions.version_of(f"{CHAMPION}{device}"),
        )
        if previous is None:
            raise ConfigError(f"--rollback {device}: there is no champion before this one that could be restored")
        pool, day = read_pool(params), approvals.on_this_day(because)
        restored, stepped_down = str(previous.version), None if champion is None else str(champion.version)
        refused = {}
        if champion and stepped_down:
            refused = {pool.name(champion): f"rolled back by hand {day}"}
            approvals.veto(stepped_down, device, f"rolled back by hand {day}", params)
        reason = f"restored by hand in place of {''.join(refused) or 'nobody'} {day}"
        approvals.hold(restored, device, reason, params, _on(device, pool))
        for alias, version in {CHAMPION: restored, PREVIOUS: stepped_down, CHALLENGER: None}.items():
            model_versions.point(f"{alias}{device}", version)
        decision = Decision(device=device, champion=pool.name(previous), reason=reason, refused=refused)
        outbox.note(device, decision, restored, pool.name(champion) if champion else None)
        told = json.loads(layout.PROMOTION.read_text(encoding="utf-8")) if layout.PROMOTION.exists() else {}
        write_json(layout.PROMOTION, told | {device: _told(params, decision)})


def _decide(device: str, pool: Pool, said: Answer | None) -> Decision:
    decision = _by_rules(device, pool)
    if not _needs_approval(decision, pool):
        return decision
    assert decision.champion is not None
    version = pool.versions[decision.champion]
    if said is None or said.version != version:
        return _staying(decision, pool, "waits for a person's approval", challenger=decision.champion)
    if said.approved:
        agreed = f"approved {approvals.on_this_day(said.because)}"
        return decision.model_copy(update={"reason": f"{decision.reason}; {agreed}"})
    denied = f"was denied by a person {approvals.on_this_day(said.because)}"
    approvals.veto(version, device, denied, pool.params)
    return _staying(decision, pool, denied, challenger=None)


def _needs_approval(decision: Decision, pool: Pool) -> bool:
    """Whether a person has to agree: the rules say so, and the champion would be another model than so far."""
    if decision.champion not in pool.versions or not pool.params.promotion[decision.device].approval:
        return False
    before = model_versions.version_of(f"{CHAMPION}{decision.device}")
    return before is None or pool.name(before) != decision.champion


def _staying(decision: Decision, pool: Pool, why: str, challenger: str | None) -> Decision:
    """`decision` when its champion may not take the place of who has it."""
    before, kept_out = model_versions.version_of(f"{CHAMPION}{decision.device}"), decision.champion
    assert kept_out is not None
    name = pool.name(before) if before else None
    refused = {key: reason for key, reason in decision.refused.items() if key != name}
    return Decision(
        device=decision.device,
        champion=name,
        challenger=challenger,
        reason=f"{'stays' if name else 'nobody yet'}: {kept_out} {why}",
        refused=refused | {kept_out: why},
    )


def _by_rules(device: str, pool: Pool) -> Decision:
    """What evaluations, rules and a person's earlier word would have."""
    # The versions of a search never served anyone, so that chains are held against the base alone.
    champion = None if layout.SEARCH.exists() else model_versions.version_of(f"{CHAMPION}{device}")
    records, impossible = found = _on(device, pool)
    impossible = impossible | {
        name: why for name, tags in pool.tags.items() if (why := approvals.vetoed(tags, device, pool.params))
    }
    if champion is None:
        return decide(device, pool.params.promotion[device], records, pool.base_reference(), impossible)
    if why := approvals.held(champion.tags, device, pool.params, found):
        others = {name: f"{pool.name(champion)} was {why}" for name in pool.versions if name != pool.name(champion)}
        return Decision(device=device, champion=pool.name(champion), reason=why, refused=others | impossible)
    decision = _beside(champion, device, pool, records, impossible)
    if decision.champion is None or not approvals.settled(champion.tags, device, pool.params, found):
        return decision
    if decision.champion == pool.name(champion):  # what was decided then is said again, in the words of then
        return approvals.as_told(decision, champion.tags, pool.tags)
    # Near enough to the champion so far, but not to the one before it: else runs in a row would creep downwards.
    return _staying(decision, pool, "fell short when this was decided; nothing has changed since", None)


def _beside(
    champion: ModelVersion,
    device: str,
    pool: Pool,
    records: Mapping[str, dict[str, Any]],
    impossible: Mapping[str, str],
) -> Decision:
    """The decision where `champion` reigns: as one of the pool, or as it was measured then."""
    name, rules = pool.name(champion), pool.params.promotion[device]
    if name not in pool.versions:
        try:
            past = read_past(pool.params, device, champion)
        except ArtifactError as error:
            alone = decide(device, rules, records, pool.base_reference(), impossible)
            return _incomparable(alone, name, str(error))
        pool, records = pool.joined_by(name, past), {**records, name: past.on_device}
    return decide(device, rules, records, pool.base_reference(), impossible, pool.champion_reference(name))


def _incomparable(decision: Decision, champion: str, why: str) -> Decision:
    """`decision` by the rules against the base alone, which says so; who reigns stays if nobody else may."""
    told = f"not compared with the champion so far, {champion}: {why}"
    if decision.champion is None:
        return decision.model_copy(update={"champion": champion, "reason": f"stays: nobody else is eligible; {told}"})
    return decision.model_copy(update={"reason": f"{decision.reason}; {told}"})


def _on(device: str, pool: Pool) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The records as `device` knows them, and whom it cannot run.

    Where it runs a compiled form, size, energy and whether it fits are those of that form, measured as the device.
    """
    params = pool.params
    target = params.target_of(device)
    found, impossible = dict(pool.records), {}
    for name, record in pool.records.items() if target else ():
        compiled = f"{name}-{target}"
        measured = device_record(params, compiled) if compiled in params.compile else None
        if measured is None:
            impossible[name] = f"not compiled for {target}, which {device} runs; add {compiled} under `compile`"
        else:
            found[name] = as_device_knows(params, device, record, measured)
    return found, impossible


def _move(device: str, decision: Decision, pool: Pool) -> None:
    """Stores on each version why it is the champion or why not, and points the aliases as `decision` has it.

    The champion's alias moves last: cut off before, the same decision is made again, by the champion so far.
    """
    before = model_versions.version_of(f"{CHAMPION}{device}")
    versions = ({pool.name(before): str(before.version)} if before else {}) | pool.versions
    champion = versions.get(decision.champion or "")
    if before and str(before.version) != champion:
        followed = f"followed by {decision.champion or 'nobody'}"
        approvals.tell_refused(str(before.version), device, decision.refused.get(pool.name(before), followed))
    for name, version in versions.items():
        if version == champion:
            approvals.tell_promoted(version, device, decision.reason)
        elif name in decision.refused:
            approvals.tell_refused(version, device, decision.refused[name])
    if champion and (before is None or str(before.version) != champion):
        approvals.settle(champion, device, pool.params, _on(device, pool))
    model_versions.point(f"{CHALLENGER}{device}", versions.get(decision.challenger or ""))
    if model_versions.move_champion(device, champion):
        outbox.note(device, decision, champion, pool.name(before) if before else None)


def _told(params: Params, decision: Decision) -> dict[str, Any]:
    """For promotion.json: the decision, and which compiled form of the champion the device gets.

    None where it runs checkpoints, has no champion, or one whose files are not here any more.
    """
    told, target = decision.model_dump(mode="json"), params.target_of(decision.device)
    name = f"{decision.champion}-{target}"
    record = device_record(params, name) if target and name in params.compile else None
    return told | {"compiled": {"name": name, "sha256": record["sha256"]} if record else None}
