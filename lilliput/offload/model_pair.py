"""Identity of a pair of device model and edge server: routers and figures hold for one pair alone."""

from __future__ import annotations

from lilliput.artifacts import Manifest
from lilliput.config import EdgeConfig
from lilliput.errors import ArtifactError

GGUF = "model.gguf"


def pair_of(device: Manifest, edge: EdgeConfig, server: Manifest | None) -> tuple[str, str]:
    """What tells one pair of device model and edge server from another, which routers and figures do not carry over to.

    Args:
        device: of the device's bundle.
        edge: what answers what the device leaves.
        server: of the edge candidate's compiled form; None for a server elsewhere.

    Returns:
        The sha256 of the device's GGUF file, and of the server's; or the server's address and model.

    Raises:
        ArtifactError: a manifest names no GGUF file.
    """
    return _gguf_sha256(device), _gguf_sha256(server) if server else f"{edge.url} {edge.model}"


def _gguf_sha256(manifest: Manifest) -> str:
    if GGUF not in manifest.files:
        raise ArtifactError(f"the manifest of {manifest.candidate} names no {GGUF}; compile it for llama.cpp again")
    return manifest.files[GGUF]
