"""Short settings: `recipe` and `device`, and the sections of the graph and the devices that a file leaves out."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from lilliput.config.devices import DEVICES, PROMOTION, GgufTarget, PromotionConfig, TargetConfig
from lilliput.config.evaluation import EnergyConfig
from lilliput.config.serving import LINKS, EdgeConfig, ServingConfig
from lilliput.config.strategies import CandidateConfig
from lilliput.errors import ConfigError

KEYS = ("recipe", "device")
_SERVED = "phone-4gb"  # the device with a gateway unless the file names another one
_BASE = CandidateConfig(parent="source", apply="load")
_LORA = CandidateConfig(parent="base", apply="lora")
_POCKET = {
    "base": _BASE,
    "lora": _LORA,
    "pruned": CandidateConfig(parent="lora", apply="prune"),
    "distilled": CandidateConfig(parent="pruned", apply="distill", teacher="lora"),
    # symmetric: for the fastest kernels on phones
    "pocket": CandidateConfig(parent="distilled", apply="gptq", with_={"symmetric": True}),
}
RECIPES: Mapping[str, Mapping[str, CandidateConfig]] = {
    "pocket": _POCKET,  # fine-tuned, pruned, distilled, quantised
    "quick": {  # without pruning and distillation
        "base": _BASE,
        "lora": _LORA,
        "pocket": CandidateConfig(parent="lora", apply="gptq", with_={"symmetric": True}),
    },
    "compared": {  # `pocket` beside the quantised base: the default
        **_POCKET,
        "gptq": CandidateConfig(parent="base", apply="gptq"),
        "gptq8": CandidateConfig(parent="base", apply="gptq", with_={"bits": 8, "calibration_examples": 32}),
    },
}
DEFAULT_RECIPE = "compared"
_COMPILED: Mapping[str, TargetConfig] = {
    "lora-gguf": GgufTarget(candidate="lora", target="gguf", floats="f16", embeddings="f16"),
    "pocket-gguf": GgufTarget(candidate="pocket", target="gguf"),
}
_SERVING = ServingConfig(edge=EdgeConfig(candidate="lora", threads=1, slots=2))


def expanded(raw: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Returns the settings `raw` of `file` without `recipe` and `device`, which become sections.

    Adds `candidates`, `devices`, `promotion`, `serving` and, unless the file has candidates of its own, `compile`.

    Raises:
        ConfigError: the recipe or the device is unknown, or the file has both `recipe` and `candidates`.
    """
    settings = {key: value for key, value in raw.items() if key not in KEYS}
    problems = [*_bad_recipe(raw), *_bad_device(raw)]
    if problems:
        raise ConfigError([f"{file}: {problem}" for problem in problems])
    if "candidates" not in raw:
        settings["candidates"] = _plain(RECIPES[raw.get("recipe", DEFAULT_RECIPE)])
        settings.setdefault("compile", _plain(_COMPILED))
    settings.setdefault("devices", _plain(_devices(raw)))
    device = raw.get("device")
    names = [device] if device else [*_mapping(settings, "devices")]
    settings.setdefault("promotion", _plain({name: PROMOTION.get(name, PromotionConfig()) for name in names}))
    settings.setdefault("serving", _plain(_serving(settings, device or _SERVED)))
    return settings


def _bad_recipe(raw: Mapping[str, Any]) -> list[str]:
    if "recipe" not in raw:
        return []
    if "candidates" in raw:
        return ["recipe: `candidates` is there as well, and both say which candidates to make; remove one of them"]
    return _unknown("recipe", raw["recipe"], RECIPES, "or write `candidates` of your own")


def _bad_device(raw: Mapping[str, Any]) -> list[str]:
    if "device" not in raw:
        return []
    known = _mapping(raw, "devices") or DEVICES
    return _unknown("device", raw["device"], known, "or describe it under `devices` (docs/configuration.md)")


def _unknown(key: str, value: object, known: Collection[str], otherwise: str) -> list[str]:
    if isinstance(value, str) and value in known:
        return []
    close = difflib.get_close_matches(str(value), known, n=1)
    hint = f"did you mean `{close[0]}`? Known: " if close else "known: "
    return [f"{key}: there is no {value!r:.80}; {hint}{', '.join(known)}; choose one, {otherwise}"]


def _devices(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all built-in devices, or with `device` only that one and the one whose power the evaluation uses."""
    if "device" not in raw:
        return dict(DEVICES)
    profile = _mapping(_mapping(raw, "evaluation"), "energy").get("profile", EnergyConfig().profile)
    return {name: config for name, config in DEVICES.items() if name in (raw["device"], profile)}


def _serving(settings: Mapping[str, Any], device: str) -> dict[str, ServingConfig]:
    """Returns a gateway for `device` if llama.cpp runs there and the edge server's candidate and link exist."""
    edge = any(_mapping({"": form}, "").get("candidate") == "lora" for form in _mapping(settings, "compile").values())
    runs = _mapping(_mapping(settings, "devices"), device).get("target") == "gguf"
    linked = _SERVING.link in (_mapping(settings, "links") if "links" in settings else LINKS)
    return {device: _SERVING} if edge and runs and linked else {}


def _mapping(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Returns the section `key`; empty if it is missing or no map, which the validation reports."""
    section = settings.get(key)
    return section if isinstance(section, Mapping) else {}


def _plain(sections: Mapping[str, Any]) -> dict[str, Any]:
    return {name: section.complete() for name, section in sections.items()}
