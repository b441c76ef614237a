"""Opens a compiled model with the runtime of its target."""

from __future__ import annotations

from pathlib import Path

from lilliput.errors import ArtifactError
from lilliput.runtime.protocol import Runtime

_GGUF = "model.gguf"  # `artifacts.GGUF`, whose import would add 20 MiB to the measured process


def open_compiled(target: str, folder: Path, threads: int, context_tokens: int) -> Runtime:
    """Opens the compiled model in `folder`.

    Args:
        target: the compile target (a module of lilliput/compile).
        folder: folder of the compiled model.
        threads: CPU threads of the runtime.
        context_tokens: maximum tokens of prompt and answer together.

    Raises:
        ArtifactError: the model does not open, or the target has no runtime.
    """
    if target == "gguf":
        from lilliput.runtime.llamacpp import LlamaCppRuntime

        return LlamaCppRuntime(folder / _GGUF, threads, context_tokens)
    if target == "onnx":
        from lilliput.runtime.onnx import OnnxRuntime

        return OnnxRuntime(folder, threads, context_tokens)
    if target == "autogptq":
        from lilliput.models import open_model
        from lilliput.runtime.torch import TorchRuntime

        return TorchRuntime(*open_model(folder), batch_size=8)
    raise ArtifactError(f"{folder}: no runtime for target `{target}`; choose gguf, onnx or autogptq")
