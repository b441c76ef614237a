"""Identity of a pair of device model and edge server. Routers and figures are valid for one pair only."""

from __future__ import annotations

from lilliput.artifacts import GGUF, Manifest
from lilliput.config import EdgeConfig
from lilliput.errors import ArtifactError


def pair_of(device: Manifest, edge: EdgeConfig, server: Manifest | None) -> tuple[str, str]:
    """Identifies a pair of device model and edge server.

    Args:
        device: manifest of the device's bundle.
        edge: settings of the edge server.
        server: manifest of the compiled edge candidate; None for a remote server.

    Returns:
        The sha256 of the device's GGUF file; the sha256 of the server's GGUF file, or the server's address and model.

    Raises:
        ArtifactError: a manifest names no GGUF file.
    """
    return _gguf_sha256(device), _gguf_sha256(server) if server else f"{edge.url} {edge.model}"


def _gguf_sha256(manifest: Manifest) -> str:
    if GGUF not in manifest.files:
        raise ArtifactError(f"the manifest of {manifest.candidate} names no {GGUF}; compile it for llama.cpp again")
    return manifest.files[GGUF]
