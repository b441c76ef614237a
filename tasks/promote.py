"""Decide which candidate is the champion of each device, and move the registry's aliases.

The stage `promote`, which `dvc repro` and the flow democratize run, and flows/promote.py all use these functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mlflow.entities.model_registry import ModelVersion

from lilliput.artifacts import write_json
from lilliput.config import Params
from lilliput.errors import ArtifactError, ConfigError
from lilliput.promote import decide
from lilliput.records import CompiledChampion, Decision, Promotion
from tasks import layout
from tasks.records import device_record, find_promotions
from tasks.registry import approvals, model_versions, outbox
from tasks.registry.approvals import ApprovalAnswer, Proposal
from tasks.registry.candidates import CandidatePool, CandidatesOnDevice, read_candidate_pool
from tasks.registry.model_versions import CHALLENGER, CHAMPION, PREVIOUS
from tasks.registry.past_champion import read_past_champion
from tasks.registry.version_records import Role, read_roles


@model_versions.translate_errors()
def promote(params: Params, answers: Mapping[str, ApprovalAnswer] | None = None) -> None:
    """Writes promotion.json with reasons, and moves the aliases `champion-`, `challenger-` and `previous-<device>`.

    Args:
        params: settings of the project.
        answers: a person's answer by device, for devices whose rules require approval; without an answer the
            champion of such a device stays.
    """
    with model_versions.promotion_lock():
        pool = read_candidate_pool(params)
        decisions = {device: _decide(device, pool, (answers or {}).get(device)) for device in params.promotion}
        model_versions.forget_devices(params.promotion)
        for device, decision in decisions.items():
            _carry_out(device, decision, pool)
        write_json(layout.PROMOTION, {device: _entry(params, decision) for device, decision in decisions.items()})


@model_versions.translate_errors()
def proposals(params: Params) -> list[Proposal]:
    """Returns the new champions that need a person's approval; moves no alias."""
    with model_versions.promotion_lock():
        pool = read_candidate_pool(params)
        decisions = [_apply_rules(device, pool) for device in params.promotion]
        return [
            Proposal(decision.device, decision.champion, pool.versions[decision.champion], decision.reason)
            for decision in decisions
            if decision.champion and _needs_approval(decision, pool)
        ]


@model_versions.translate_errors()
def roll_back(params: Params, device: str, reason: str) -> None:
    """Restores the previous champion, and keeps it until an evaluation or the rules of `device` change.

    The replaced version stores `reason` and becomes `previous-<device>`, so a second rollback undoes the first.

    Raises:
        ConfigError: the device has no rules or no previous champion.
    """
    if device not in params.promotion:
        raise ConfigError(f"--rollback {device}: no such device under `promotion`: {', '.join(params.promotion)}")
    with model_versions.promotion_lock():
        previous, champion = (
            model_versions.version_of(f"{PREVIOUS}{device}"),
            model_versions.version_of(f"{CHAMPION}{device}"),
        )
        if previous is None:
            raise ConfigError(f"--rollback {device}: there is no earlier champion to restore")
        pool, dated_reason = read_candidate_pool(params), approvals.dated(reason)
        restored, replaced = str(previous.version), None if champion is None else str(champion.version)
        refused = {}
        if champion and replaced:
            refused = {pool.name_of(champion): f"rolled back by hand {dated_reason}"}
        restored_because = f"restored by hand in place of {''.join(refused) or 'no champion'} {dated_reason}"
        approvals.hold(restored, device, restored_because, params, pool.on_device(device).basis)
        if replaced:
            approvals.veto(replaced, device, f"rolled back by hand {dated_reason}", params)
        for alias, version in {CHAMPION: restored, PREVIOUS: replaced, CHALLENGER: None}.items():
            model_versions.set_alias(f"{alias}{device}", version)
        decision = Decision(device=device, champion=pool.name_of(previous), reason=restored_because, refused=refused)
        outbox.add(device, decision, restored, pool.name_of(champion) if champion else None)
        write_json(layout.PROMOTION, find_promotions() | {device: _entry(params, decision)})


def _decide(device: str, pool: CandidatePool, answer: ApprovalAnswer | None) -> Decision:
    decision = _apply_rules(device, pool)
    if not _needs_approval(decision, pool):
        return decision
    assert decision.champion is not None
    version = pool.versions[decision.champion]
    if answer is None or answer.version != version:
        return _keep_champion(decision, pool, "waits for a person's approval", challenger=decision.champion)
    if answer.approved:
        approved = f"approved {approvals.dated(answer.reason)}"
        return decision.model_copy(update={"reason": f"{decision.reason}; {approved}"})
    denied = f"was denied by a person {approvals.dated(answer.reason)}"
    approvals.veto(version, device, denied, pool.params)
    return _keep_champion(decision, pool, denied, challenger=None)


def _needs_approval(decision: Decision, pool: CandidatePool) -> bool:
    """Whether the rules require approval and the champion would become another model."""
    if decision.champion not in pool.versions or not pool.params.promotion[decision.device].approval:
        return False
    current = model_versions.version_of(f"{CHAMPION}{decision.device}")
    return current is None or pool.name_of(current) != decision.champion


def _keep_champion(decision: Decision, pool: CandidatePool, why: str, challenger: str | None) -> Decision:
    """Returns `decision` with the current champion, and its new champion refused because of `why`."""
    current, rejected = model_versions.version_of(f"{CHAMPION}{decision.device}"), decision.champion
    assert rejected is not None
    name = pool.name_of(current) if current else None
    refused = {key: reason for key, reason in decision.refused.items() if key != name}
    return Decision(
        device=decision.device,
        champion=name,
        challenger=challenger,
        reason=f"{'stays' if name else 'no champion yet'}: {rejected} {why}",
        refused=refused | {rejected: why},
    )


def _apply_rules(device: str, pool: CandidatePool) -> Decision:
    """Returns the decision by evaluations, rules, vetoes and holds."""
    # The versions of a search were never served, so its chains are compared with the base only.
    champion = None if layout.SEARCH.exists() else model_versions.version_of(f"{CHAMPION}{device}")
    candidates = pool.on_device(device)
    device_records = candidates.basis
    vetoed = {
        name: why
        for name, role in pool.roles_on(device).items()
        if (why := approvals.veto_reason(role, device, pool.params))
    }
    candidates = replace(candidates, impossible={**candidates.impossible, **vetoed})
    if champion is None:
        base = pool.base_reference(candidates)
        return decide(device, pool.params.promotion[device], candidates.records, base, candidates.impossible)
    name, role = pool.name_of(champion), read_roles(champion).get(device, Role())
    if why := approvals.hold_reason(role, device, pool.params, device_records):
        others = {other: f"{name} was {why}" for other in pool.versions if other != name}
        return Decision(device=device, champion=name, reason=why, refused=others | dict(candidates.impossible))
    decision = _compare_with_champion(champion, device, pool, candidates)
    if decision.champion is None or not approvals.is_settled(role, device, pool.params, device_records):
        return decision
    if decision.champion == name:
        return approvals.with_recorded_reasons(decision, role, pool.roles_on(device))
    # It is close enough to the champion, but was not to the one before: repeated runs must not lower the level.
    return _keep_champion(decision, pool, "fell short when this was decided; nothing has changed since", None)


def _compare_with_champion(
    champion: ModelVersion,
    device: str,
    pool: CandidatePool,
    candidates: CandidatesOnDevice,
) -> Decision:
    """Returns the decision relative to `champion`, which is a candidate or is read back from MLflow."""
    name, rules = pool.name_of(champion), pool.params.promotion[device]
    if name not in pool.versions:
        try:
            past = read_past_champion(pool.params, device, champion)
        except ArtifactError as error:
            base = pool.base_reference(candidates)
            decision = decide(device, rules, candidates.records, base, candidates.impossible)
            return _without_comparison(decision, name, str(error))
        pool, candidates = pool.with_past_champion(name, past), candidates.with_past_champion(name, past)
    return decide(
        device,
        rules,
        candidates.records,
        pool.base_reference(candidates),
        candidates.impossible,
        pool.champion_reference(name, candidates),
    )


def _without_comparison(decision: Decision, champion: str, why: str) -> Decision:
    """Notes in `decision` that `champion` was not compared; it stays if no candidate is eligible."""
    note = f"not compared with the champion so far, {champion}: {why}"
    if decision.champion is None:
        return decision.model_copy(update={"champion": champion, "reason": f"stays: no candidate is eligible; {note}"})
    return decision.model_copy(update={"reason": f"{decision.reason}; {note}"})


def _carry_out(device: str, decision: Decision, pool: CandidatePool) -> None:
    """Stores the reasons of `decision` on each version, and moves the aliases.

    The champion's alias moves last. After an interruption, the same decision is made relative to the old champion.
    """
    before = model_versions.version_of(f"{CHAMPION}{device}")
    versions = ({pool.name_of(before): str(before.version)} if before else {}) | pool.versions
    champion = versions.get(decision.champion or "")
    if before and str(before.version) != champion:
        replaced = f"replaced by {decision.champion or 'no champion'}"
        approvals.record_refused(str(before.version), device, decision.refused.get(pool.name_of(before), replaced))
    for name, version in versions.items():
        if version == champion:
            approvals.record_promoted(version, device, decision.reason)
        elif name in decision.refused:
            approvals.record_refused(version, device, decision.refused[name])
    if champion and (before is None or str(before.version) != champion):
        approvals.mark_settled(champion, device, pool.params, pool.on_device(device).basis)
    model_versions.set_alias(f"{CHALLENGER}{device}", versions.get(decision.challenger or ""))
    if model_versions.move_champion(device, champion):
        outbox.add(device, decision, champion, pool.name_of(before) if before else None)


def _entry(params: Params, decision: Decision) -> Promotion:
    """Returns the entry for promotion.json: the decision, and the champion's compiled model for the device.

    The compiled model is None if the device runs checkpoints, has no champion, or its files are missing.
    """
    target = params.target_of(decision.device)
    name = f"{decision.champion}-{target}"
    record = device_record(params, name) if target and name in params.compile else None
    compiled = CompiledChampion(name=name, sha256=record.sha256) if record else None
    return Promotion(**dict(decision), compiled=compiled)
