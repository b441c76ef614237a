"""Opens what a target compiled, by that target's own runtime."""

from __future__ import annotations

from pathlib import Path

from lilliput.errors import ArtifactError
from lilliput.runtime.protocol import Runtime


def open_compiled(target: str, folder: Path, threads: int, context_tokens: int) -> Runtime:
    """The compiled model in `folder` behind its runtime.

    Args:
        target: which of lilliput/compile made it.
        folder: where it lies.
        threads: CPU threads it may use.
        context_tokens: of prompt and answer together.

    Raises:
        ArtifactError: it does not open, or nothing runs this target.
    """
    if target == "gguf":
        from lilliput.runtime.llamacpp import LlamaCppRuntime

        return LlamaCppRuntime(folder / "model.gguf", threads, context_tokens)
    if target == "onnx":
        from lilliput.runtime.onnx import OnnxRuntime

        return OnnxRuntime(folder, threads, context_tokens)
    if target == "autogptq":
        from lilliput.models import open_model
        from lilliput.runtime.torch import TorchRuntime

        return TorchRuntime(*open_model(folder), batch_size=8)
    raise ArtifactError(f"{folder}: no runtime here for target `{target}`")
