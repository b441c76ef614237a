"""A stage of the pipeline, as flows, runners and plans pass it around."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml.

    Attributes:
        name: for example `compress@lora`.
        command: as dvc.yaml has it.
        description: one line.
        needs: names of the stages that it depends on directly.
        outputs: paths relative to the folder of dvc.yaml.
    """

    name: str
    command: str
    description: str
    needs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def candidate(self) -> str | None:
        """The candidate it works on; None for stages that exist once."""
        return self.name.partition("@")[2] or None

    @property
    def title(self) -> str:
        """The title in the Prefect UI: `pocket: gptq on distilled`."""
        return f"{self.candidate}: {self.description}" if self.candidate else f"{self.name}: {self.description}"
