"""Write the bundle of each device: its champion's compiled model, ready to run."""

from __future__ import annotations

from lilliput.artifacts import read_record, verify, writing
from lilliput.compile.bundle import BundleSettings, write_bundle
from lilliput.config import Params
from lilliput.errors import ArtifactError
from lilliput.records import Promotions
from tasks import layout


def bundle(params: Params) -> None:
    """Writes bundles/<device> for each device whose champion is compiled for its target."""
    with writing(layout.BUNDLES) as directory:
        for device, decision in read_record(Promotions, layout.PROMOTION).items():
            if decision.compiled is None:
                continue
            config = params.compile[decision.compiled.name]
            compiled = layout.compiled(config.candidate, config.target)
            manifest = verify(compiled)
            if manifest.artifact_sha256 != decision.compiled.sha256:
                raise ArtifactError(f"{compiled}: not what was promoted for {device}; run the stage promote again")
            profile = params.devices[device]
            settings = BundleSettings(
                device=device,
                threads=profile.threads,
                context_tokens=profile.context_tokens,
                system_prompt=params.data.system_prompt,
                max_new_tokens=params.evaluation.max_new_tokens,
                licence=params.source.licence,
            )
            (directory / device).mkdir()
            write_bundle(directory / device, compiled, layout.model(config.candidate), manifest, settings)
