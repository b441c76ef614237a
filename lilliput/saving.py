"""Saves models and proves that what was saved opens in a fresh process with the same logits."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lilliput.errors import ArtifactError
from lilliput.forked import run_fresh
from lilliput.models import open_frozen, stored_dtype
from lilliput.redaction import environment_without_secrets
from lilliput.stored_weights import tensor_of

PROBE_TEXT = "The capital of France is Paris. Water is made of hydrogen and oxygen; iron is a metal, and so is gold."


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype | None = None
) -> None:
    """Writes a checkpoint that plain transformers opens; first casts the weights of `model` to `dtype` in place.

    Raises:
        ArtifactError: a weight is NaN or infinite, or does not fit into `dtype`; nothing is written.
    """
    require_finite(
        model,
        dtype or stored_dtype(model),
        f"{directory}: not written",
        "the previous step diverged: lower its learning rate, or raise the damping of its solver",
    )
    for parameter in model.parameters():  # not the buffers: rounding rotary frequencies would change every logit
        parameter.data = parameter.data.to(dtype or stored_dtype(model))
    # Lilliput decodes greedily only; sampling defaults of the source are kept for other programs.
    model.generation_config = model.generation_config or GenerationConfig.from_model_config(model.config)
    model.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)


def require_finite(model: torch.nn.Module, dtype: torch.dtype, place: str, remedy: str) -> None:
    """Raises ArtifactError if a weight or buffer of `model` is NaN or infinite, or would be in `dtype`.

    Args:
        model: in any float dtype.
        dtype: dtype of the checkpoint.
        place: the model's location, for the message.
        remedy: advice against NaN and infinite values, for the message.
    """
    for name, weight in model.state_dict(keep_vars=True).items():
        tensor = tensor_of(weight)
        if not tensor.is_floating_point() or _is_finite_in(tensor, dtype):
            continue
        if invalid := int((~torch.isfinite(tensor)).sum()):
            raise ArtifactError(f"{place}: {name}: {invalid} of {tensor.numel()} values are NaN or infinite; {remedy}")
        if too_large := int((~torch.isfinite(tensor.to(dtype))).sum()):
            raise ArtifactError(
                f"{place}: {name}: {too_large} of {tensor.numel()} values (largest {tensor.abs().max().item():.4g}) do "
                f"not fit into {str(dtype).removeprefix('torch.')} (at most {torch.finfo(dtype).max:.4g}); store it as "
                "bfloat16 or float32 (strategies.load.dtype)"
            )


def _is_finite_in(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `tensor` is finite in `dtype`: its extremes are, because rounding is monotonic and extremes keep NaN."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).to(dtype).isfinite().all())


@torch.inference_mode()
def probe_logits(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Returns the logits of `PROBE_TEXT`, float32, shape (tokens, vocabulary)."""
    ids = tokenizer(PROBE_TEXT, return_tensors="pt")["input_ids"]
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device)).logits[0].float().cpu()


def _require_finite_logits(logits: torch.Tensor, directory: Path) -> None:
    if not torch.isfinite(logits).all():
        raise ArtifactError(
            f"{directory}: the model's logits are NaN or infinite although its weights are finite, so some weights are "
            "too large; lower the learning rate of its training, or choose another parent"
        )


def prove_reload(directory: Path, expected_logits: torch.Tensor, tolerance: float) -> float:
    """Reopens `directory` in a fresh process and returns its largest logit difference from the model in memory.

    Args:
        directory: the written checkpoint.
        expected_logits: `probe_logits` of the model in memory, shape (tokens, vocabulary).
        tolerance: largest allowed absolute difference of logits.

    Raises:
        ArtifactError: the checkpoint does not open, differs from the model in memory, or has NaN or infinite logits.
    """
    _require_finite_logits(expected_logits, directory)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "reloaded.safetensors")
        arguments = [str(directory), str(path)]
        code, output = run_fresh("lilliput.saving", arguments, environment_without_secrets())
        if code:
            raise ArtifactError(f"{directory}: does not reopen in a fresh process:\n{output[-2000:]}")
        difference = (load_file(path)["logits"] - expected_logits).abs().max().item()
    if not difference <= tolerance:  # in this form NaN fails too
        raise ArtifactError(
            f"{directory}: after reopening in a fresh process its logits differ by {difference:.3g} "
            f"(tolerance {tolerance:.3g}), so the written checkpoint is not the model in memory"
        )
    return difference


def _write_probe(arguments: Iterable[str]) -> Any:
    directory, target = (Path(argument) for argument in arguments)
    save_file({"logits": probe_logits(*open_frozen(directory))}, target)


if __name__ == "__main__":
    _write_probe(sys.argv[1:])
