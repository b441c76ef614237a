"""The chosen policies as the gateway needs them: which parts to open, and a sentence on what is served and why."""

from __future__ import annotations

from collections.abc import Mapping

from lilliput.config import Look, ServingConfig
from lilliput.errors import ArtifactError
from lilliput.records import OffloadRecord, PolicyChoice, ServedPolicy

Choices = Mapping[str, PolicyChoice]  # by link
LOOK_OF: dict[ServedPolicy, Look] = {"learned_before": "before", "learned_after": "after"}
_NAMES: dict[ServedPolicy, str] = {
    "device": "the device",
    "server": "the edge server",
    "threshold": "the threshold of confidence",
    "learned_before": "the learned router (before the answer)",
    "learned_after": "the learned router (after the answer)",
}


def require_choices(record: OffloadRecord | None, file: str) -> dict[str, PolicyChoice]:
    """The choices of `record`, by link.

    Args:
        record: of the stage `offload`; None without one.
        file: its file, for messages.

    Raises:
        ArtifactError: there is no record, or an older version wrote it, which chose no policy.
    """
    remedy = "run the stage `offload` for this device again, or name a policy under `serving`"
    if record is None:
        raise ArtifactError(f"{file}: no such file, so no policy is chosen yet; {remedy}")
    if record.choices is None:
        raise ArtifactError(f"{file}: lacks `choices`, because an older version wrote it; {remedy}")
    return record.choices


def uses_learned(serving: ServingConfig, choices: Choices | None) -> bool:
    """Whether the router of `serving` has a fit, which also needs the embedder."""
    if serving.policy != "best":
        return serving.policy == "learned"
    return any(choice.served in LOOK_OF for choice in (choices or {}).values())


def uses_edge(serving: ServingConfig, choices: Choices | None) -> bool:
    """Whether the router of `serving` can send anything to the edge server."""
    if serving.policy != "best":
        return serving.policy != "device"
    return any(choice.served != "device" for choice in (choices or {}).values())


def describe(choice: PolicyChoice) -> str:
    """A sentence, without a capital and a full stop, that says which policy is served and why."""
    served = _NAMES[choice.served]
    if choice.reason == "unsupported":
        return f"no policy is shown to route better than chance at equal cost, so {served} answers everything"
    if choice.reason == "place":
        return f"{served} answers everything: it is shown to meet the objective better than any router"
    if choice.reason == "simpler":
        return f"{served} routes: it is shown to beat chance, and no more complex router is shown to beat it"
    return f"{served} routes: it is shown to beat chance, and meets the objective best"


def describe_all(choices: Choices) -> dict[str, str]:
    """The sentence of each link."""
    return {link: describe(choice) for link, choice in choices.items()}
