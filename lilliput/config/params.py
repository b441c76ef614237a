"""All of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from lilliput.config.devices import DeviceConfig, ParityConfig, PromotionConfig, TargetConfig
from lilliput.config.evaluation import CachingConfig, EvaluationConfig
from lilliput.config.inputs import BUILT_IN, DataConfig, SourceConfig, SynthesiseConfig
from lilliput.config.reading import validate
from lilliput.config.section import LinkName, Name, Section
from lilliput.config.serving import LINKS, LinkConfig, ServingConfig
from lilliput.config.shorthand import KEYS
from lilliput.config.strategies import CandidateConfig, StrategiesConfig


class Params(Section):
    """All of params.yaml. What a short file leaves out of the graph and the devices, `lilliput.params` adds before."""

    shorthand = KEYS

    source: SourceConfig = BUILT_IN
    synthesise: dict[Name, SynthesiseConfig] = Field(default_factory=dict)
    data: DataConfig = DataConfig()
    strategies: StrategiesConfig = StrategiesConfig()
    candidates: Annotated[dict[Name, CandidateConfig], Field(min_length=1)]
    evaluation: EvaluationConfig = EvaluationConfig()
    caching: CachingConfig = CachingConfig()
    compile: dict[Name, TargetConfig] = Field(default_factory=dict)
    parity: ParityConfig = ParityConfig()
    devices: Annotated[dict[Name, DeviceConfig], Field(min_length=1)]
    promotion: dict[Name, PromotionConfig]
    links: dict[LinkName, LinkConfig] = LINKS
    serving: dict[Name, ServingConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _energy_profile_is_a_device(self) -> Params:
        profile = self.evaluation.energy.profile
        if profile not in self.devices:
            raise ValueError(
                f"evaluation.energy.profile: {profile!r} is not a device; name one of {', '.join(self.devices)}"
            )
        return self

    @model_validator(mode="after")
    def _promotion_is_for_devices(self) -> Params:
        if unknown := [name for name in self.promotion if name not in self.devices]:
            raise ValueError(f"promotion: {', '.join(unknown)}: no such device; name one of {', '.join(self.devices)}")
        return self

    @model_validator(mode="after")
    def _serving_is_possible(self) -> Params:
        for name, serving in self.serving.items():
            place = f"serving.{name}"
            if name not in self.devices:
                able = [device for device, config in self.devices.items() if config.target == "gguf"]
                remedy = f"name one of {', '.join(able)}" if able else "add one with `target: gguf` under `devices`"
                raise ValueError(f"{place}: no such device; {remedy}")
            if self.devices[name].target != "gguf":
                raise ValueError(f"{place}: llama.cpp serves it; set `target: gguf` under devices.{name}")
            if serving.link not in self.links:
                raise ValueError(f"{place}.link: {serving.link!r} is not under `links`: {', '.join(self.links)}")
            served = [form.candidate for form in self.compile.values() if form.target == "gguf"]
            if serving.edge.candidate not in (None, *served):
                raise ValueError(
                    f"{place}.edge: {serving.edge.candidate!r} is not compiled for llama.cpp; add it under `compile` "
                    "with `target: gguf`"
                )
        return self

    @property
    def watts_per_core(self) -> float:
        """Power of a busy core of the evaluating machine, from its device profile."""
        return self.devices[self.evaluation.energy.profile].watts_per_core

    def target_of(self, device: str) -> str | None:
        """Returns the target that `device` runs; None for checkpoints, or if nothing is compiled."""
        return self.devices[device].target if self.compile else None

    def strategy_config(self, candidate: str) -> Section:
        """Returns the settings of `candidate`'s strategy with its `with` applied.

        Raises:
            ConfigError: an override is unknown or has a wrong type.
        """
        spec = self.candidates[candidate]
        defaults = getattr(self.strategies, spec.apply)
        place = f"candidates.{candidate}.with"
        return validate(type(defaults), defaults.model_dump(mode="json") | spec.with_, "params.yaml", place)
