"""Opens GPTQ checkpoints in formats that only GPTQModel reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from lilliput.resident import release_memory


def open_with_gptqmodel(directory: Path) -> PreTrainedModel:
    """Opens a GPTQ checkpoint of any format that GPTQModel reads."""
    from gptqmodel import BACKEND, GPTQModel

    # The kernel opens in float16 only: exact for the scales, but not for weights that are stored as floats.
    packed = GPTQModel.load(
        str(directory), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16, trust_remote_code=False
    ).model
    model = dequantise(cast("PreTrainedModel", packed))
    parameters = dict(model.named_parameters())
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in parameters.keys() & set(tensors.keys()):
                parameters[name].data = tensors.get_tensor(name).float()
    release_memory()
    return model


def dequantise(model: PreTrainedModel) -> PreTrainedModel:
    """Converts `model` in place to float32, with plain linear layers instead of GPTQModel's."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    # GPTQModel compiles the formula on first use, which takes longer than running it on every layer.
    with torch.compiler.set_stance("force_eager"):
        for name in [name for name, module in model.named_modules() if isinstance(module, TorchLinear)]:
            model.set_submodule(name, _dense(model.get_submodule(name)))  # one by one, to free each packed layer
    for parameter in model.parameters():  # not the buffers, see saving.save_model
        parameter.data = parameter.data.float()
    return model


def _dense(module: Any) -> torch.nn.Linear:
    linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    module.scales.data = module.scales.data.float()
    linear.weight.data = module.dequantize_weight().T.float().contiguous()
    if module.bias is not None:
        linear.bias.data = module.bias.float()
    return linear
